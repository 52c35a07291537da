"""What users hand in: tasks, batches, data sets, indices and the fingerprints by which examples are recognized."""
