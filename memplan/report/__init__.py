"""Answers as plain data, and that data as text and tables."""
