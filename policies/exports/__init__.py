"""Policies as other programs load them."""
