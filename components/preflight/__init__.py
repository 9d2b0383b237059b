"""Component `preflight`."""
