"""Data: sources, tasks, splits, and the rendering of examples as prompts and answers."""
