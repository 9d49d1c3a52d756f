"""The public names of a package, loaded when they are first used."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_exports(package: str, home: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package (PEP 562) whose names live in other modules.

    So that importing the package, or one file of it, loads neither torch nor a slide reader.

    Args:
        package: its ``__name__``.
        home: name → the module that defines it.

    Returns:
        a function that gives the value of a name, or raises AttributeError.

    Example:
        >>> getattr_of = lazy_exports("extract", {"ExtractError": "extract.errors"})
        >>> getattr_of("ExtractError").__name__
        'ExtractError'
    """

    def find(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(home[name]), name)

    return find
