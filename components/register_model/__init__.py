"""Component `register_model`."""
