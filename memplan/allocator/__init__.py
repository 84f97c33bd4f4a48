"""How the caching allocator sees it: a simulator of PyTorch's CUDA caching allocator, and replays through it."""
