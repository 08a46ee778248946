"""Floor 0: records, the run store, progress, statistics and pages; knows nothing of models."""
