"""``python -m mil``: the command line."""

from mil.cli.main import main

if __name__ == "__main__":
    main()
