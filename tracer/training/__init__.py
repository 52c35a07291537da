"""The training run that is explained: its checkpoints, optimizer states and recordings."""
