"""The pipeline's steps as Kubeflow container components, one folder each."""
