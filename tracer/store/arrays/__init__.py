"""Chunked arrays on a disk or a remote store, and which of their rows are complete."""
