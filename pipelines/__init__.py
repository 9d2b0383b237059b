"""The pipelines: their definition, compiled form, configurations and local runner."""
