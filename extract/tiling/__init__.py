"""Where a slide is cut: tissue, pen, tiles, their quality."""
