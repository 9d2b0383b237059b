"""Component `evaluate_student`."""
