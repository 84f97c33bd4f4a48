"""What is given: frozen values without I/O and without torch."""
