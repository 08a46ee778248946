"""Floor 4: from raw files to the batches a model trains on."""
