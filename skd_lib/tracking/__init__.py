"""What MLflow keeps of a run: its lineage, its figures, and the registered student."""
