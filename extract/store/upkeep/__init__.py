"""Stores summarised, verified, repaired and converted."""
