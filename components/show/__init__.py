"""Component `show`."""
