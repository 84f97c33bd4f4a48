"""Gradients of the whole batch against accumulated ones, measured: the part that needs torch."""
