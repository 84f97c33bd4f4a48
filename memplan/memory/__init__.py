"""How many bytes, and when: allocation events read off the tapes, and what the model states need."""
