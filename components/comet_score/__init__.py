"""Component `evaluate`."""
