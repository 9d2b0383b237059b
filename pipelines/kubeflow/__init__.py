"""Submitting runs to Kubeflow Pipelines: credentials, the server's API, and what a person sees of a run."""
