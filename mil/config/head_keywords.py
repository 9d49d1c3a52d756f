"""Names of the heads and of their keywords, known before torch is loaded.

Loading torch takes seconds, which nobody should wait for to hear of a mistyped name. Until `aggregators` is imported
its sources are read as text; what is registered from then on, also by others, is asked of the registry.
"""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_PACKAGE, _DECORATOR = "aggregators", "register_aggregator"
_NOT_KEYWORDS = ("self", "in_dim", "n_classes")


def head_keywords() -> dict[str, tuple[str, ...]]:
    """The keywords of every head's constructor, by its name, sorted.

    Example:
        >>> "gated" in head_keywords()["abmil"]
        True
    """
    written = {} if _PACKAGE in sys.modules else _written()
    return written or _registered()


def _registered() -> dict[str, tuple[str, ...]]:
    from aggregators import list_aggregators
    from aggregators.registry import keyword_names

    return {name: tuple(keyword_names(name)) for name in list_aggregators()}


@cache
def _written() -> dict[str, tuple[str, ...]]:
    """What the sources say; nothing where there are none."""
    spec = find_spec(_PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    found: dict[str, tuple[str, ...]] = {}
    for path in sorted(path for folder in folders or () for path in Path(folder).glob("*.py")):
        found |= dict(_heads_of(ast.parse(path.read_text(encoding="utf-8"))))
    return dict(sorted(found.items()))


def _heads_of(tree: ast.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Name and keywords of the heads that a file registers."""
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for each in classes.values():
        for call in each.decorator_list:
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == _DECORATOR:
                yield ast.literal_eval(call.args[0]), tuple(_constructor_keywords(each, classes))


def _constructor_keywords(head: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> Iterator[str]:
    """The arguments of the class's constructor, or of that of its base in the same file."""
    own = [node for node in head.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    if own:
        names = [each.arg for each in (*own[0].args.posonlyargs, *own[0].args.args, *own[0].args.kwonlyargs)]
        yield from (name for name in names if name not in _NOT_KEYWORDS)
        return
    for base in head.bases:
        if isinstance(base, ast.Name) and base.id in classes:
            yield from _constructor_keywords(classes[base.id], classes)
