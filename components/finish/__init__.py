"""Component `finish`."""
