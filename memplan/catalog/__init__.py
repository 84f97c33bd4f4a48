"""What is known from disk: GPUs, models, calibrations, measurements."""
