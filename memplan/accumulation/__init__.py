"""Carrying out a plan in a plain PyTorch loop: one optimizer step of several micro-batches, and what it tells.

Needs torch when it is called, and nothing else.
"""
