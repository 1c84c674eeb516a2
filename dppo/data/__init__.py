"""Demonstrations: reading, recording and storing them."""
