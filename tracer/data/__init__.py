"""Inputs from users: tasks, batches, data sets, indices, and fingerprints that recognize examples."""
