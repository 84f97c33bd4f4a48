"""The user's real module: what a training step of it allocates, traced without a GPU."""
