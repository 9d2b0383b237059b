"""Component `teacher_sft`."""
