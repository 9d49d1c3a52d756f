"""Sweeps: the search space, trials, the nested choice."""
