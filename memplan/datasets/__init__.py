"""Data sets as files: records read one after the other, what of them is text, and how many tokens it has."""
