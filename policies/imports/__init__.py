"""Policies that other projects saved, read as data: nothing that comes from a file is ever executed."""
