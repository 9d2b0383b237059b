"""Component `evaluate_teacher`."""
