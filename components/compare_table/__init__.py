"""Component `compare_table`."""
