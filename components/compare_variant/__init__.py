"""Component `compare_variant`."""
