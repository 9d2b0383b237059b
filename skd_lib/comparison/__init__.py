"""Comparisons of methods and settings: trials, plan, table."""
