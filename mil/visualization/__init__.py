"""Draws what it is given: figures, pictures, pages. The only room with matplotlib and jinja2."""
