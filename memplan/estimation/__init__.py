"""From tapes and a setup to the memory of a whole training step."""
