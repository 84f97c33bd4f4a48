"""memplan: says before a training run starts whether it fits on the GPU, and plans the fastest way that does."""

__version__ = "0.1.0"
