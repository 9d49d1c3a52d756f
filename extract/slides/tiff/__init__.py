"""TIFF files: what their directories say, whether OpenSlide reads them rightly, and their tiles read from the file."""
