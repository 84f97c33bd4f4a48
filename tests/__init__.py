"""The tests of memplan."""
