"""Tiles read in a process of their own, through a shared ring."""
