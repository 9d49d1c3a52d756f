"""Arrays in, numbers with intervals out; knows no run, no head and no file."""
