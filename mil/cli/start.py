"""Where ``mil`` begins: a line within the first moment, and then everything that takes time to load."""

import sys

from mil.cli.activity import ACTIVITY


def main() -> None:
    """Run the command line."""
    arguments = sys.argv[1:]
    if arguments in (["--version"], ["-V"]):
        from importlib.metadata import version

        print(f"mil {version('tessera-mil')}")
        return
    ACTIVITY.begin(arguments)
    from mil.cli.main import main as run

    run()
