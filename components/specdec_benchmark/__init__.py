"""Component `specdec_benchmark`."""
