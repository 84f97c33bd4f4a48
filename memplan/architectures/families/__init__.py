"""One file a family: how its config is read, and what its layers compute."""
