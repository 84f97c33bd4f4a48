"""What a data set's lengths mean for training: truncation, padding, packing.  Pure functions of arrays of lengths."""
