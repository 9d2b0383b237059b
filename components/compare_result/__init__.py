"""Component `compare_result`."""
