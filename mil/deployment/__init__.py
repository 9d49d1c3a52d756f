"""A model leaves the house: packed, applied, judged on another cohort, exported, described."""
