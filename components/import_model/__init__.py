"""Component `import_model`."""
