"""Triggering runs when new data arrives: once for the same data, however often and by whom it is announced."""
