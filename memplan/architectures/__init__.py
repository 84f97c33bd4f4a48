"""What does a model compute?  One description per architecture; everything else is derived from it."""
