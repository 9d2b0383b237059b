"""Component `student_init`."""
