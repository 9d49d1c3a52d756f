"""``python -m mil``: the command line."""

from mil.cli.start import main

if __name__ == "__main__":
    main()
