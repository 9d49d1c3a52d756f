"""The formats of a store: Zarr, HDF5, objects at a URL."""
