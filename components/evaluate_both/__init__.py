"""Component `evaluate_both`."""
