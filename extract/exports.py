"""The public names of a package, loaded when they are first used, and modules under the names that they once had."""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
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


class MovedModules(MetaPathFinder, Loader):
    """Imports modules under names that they had in earlier versions, with a DeprecationWarning.

    It stands last in ``sys.meta_path``, so it is asked only for what is not there.

    Args:
        moved: name → where its content is now; a module whose content lies in several has several.
    """

    def __init__(self, moved: Mapping[str, Sequence[str]]) -> None:
        self._moved = moved

    def install(self) -> None:
        """Be asked from now on."""
        sys.meta_path.append(self)

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """A spec for a module that has moved, or None."""
        return ModuleSpec(fullname, self) if fullname in self._moved else None

    def create_module(self, spec: ModuleSpec) -> None:
        """The usual module."""

    def exec_module(self, module: ModuleType) -> None:
        """Warn, and hand the module the names of its new homes."""
        homes = self._moved[module.__name__]
        warnings.warn(
            f"{module.__name__} is now {' and '.join(homes)}; the old name goes with the next version",
            DeprecationWarning,
            stacklevel=2,
        )
        for home in homes:
            names = {name: value for name, value in vars(import_module(home)).items() if not name.startswith("__")}
            vars(module).update(names)
