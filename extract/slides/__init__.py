"""Slide files and what lies beside them: levels, pixels, masks, ids."""
