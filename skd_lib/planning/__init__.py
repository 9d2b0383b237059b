"""Estimates of a run before it starts: memory, time and cost."""
