"""How other tools lay out their bags, one layout a file."""
