"""The default projector: a sketch of every gradient form that never builds the gradient."""
