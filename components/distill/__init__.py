"""Component `distill`."""
