"""Folders that hold results, written and read."""
