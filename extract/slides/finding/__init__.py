"""Which slides a run is about: files and folders, the table, masks by their names, and ids."""
