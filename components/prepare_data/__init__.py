"""Component `prepare_data`."""
