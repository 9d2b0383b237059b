"""MLflow's records: runs and their figures, the registered students, the champion, the lineage."""
