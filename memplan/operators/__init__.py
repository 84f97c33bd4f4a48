"""Operators of PyTorch as autograd sees them: what each computes, keeps, needs for a moment, and costs."""
