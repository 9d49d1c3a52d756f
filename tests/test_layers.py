"""Data flows one way: two leaves (extract, aggregators), one trunk (mil), and rooms that import what they say.

A room is a folder of files, or a file beside the folders. ``ROOMS`` lists them from the ground up, each with the rooms
of its package that it imports, no more and no less; the files of a room import each other in no circle. A module that
is named in a string, such as a command for another process, counts as imported.
"""

import ast
import graphlib
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

ROOMS = {
    "extract": {
        "errors": "",
        "exports": "",
        "memory": "",
        "geometry": "errors",
        "folders": "",
        "signals": "",
        "channel": "",
        "store/core": "errors",
        "store/formats": "errors geometry store/core",
        "store/upkeep": "errors store/core store/formats",
        "store": "store/core store/formats store/upkeep",
        "store/foreign/layouts": "errors",
        "store/foreign": "errors folders channel store/core store/formats store store/foreign/layouts",
        "slides/tiff": "errors",
        "slides": "errors geometry store/core slides/tiff",
        "slides/finding": "errors folders slides",
        "synthetic": "errors exports slides",
        "tiling": "errors geometry store/core store slides slides/finding",
        "backbones": "errors exports store/core store",
        "reading": "errors channel memory geometry store slides slides/finding tiling",
        "pipeline": "errors exports memory geometry folders signals channel store/core store/formats store/upkeep "
        "store slides slides/finding tiling backbones reading",
        "planning": "errors memory geometry folders store/core store/formats store slides slides/finding synthetic "
        "tiling backbones reading pipeline",
        "__init__": "errors exports store slides tiling backbones pipeline planning",
    },
    "mil": {
        "errors": "",
        "arrays": "",
        "files": "errors",
        "cohort": "errors arrays",
        "statistics": "errors arrays cohort",
        "visualization": "errors arrays files statistics",
        "splits": "errors arrays files cohort",
        "config": "errors cohort",
        "bags": "errors arrays config",
        "training": "errors arrays files cohort statistics splits config bags",
        "evaluation": "errors arrays files cohort statistics training",
        "runs": "errors arrays files cohort splits config training evaluation",
        "reports": "errors arrays files cohort statistics visualization evaluation runs",
        "experiments": "errors arrays files cohort statistics visualization splits config bags training evaluation "
        "runs",
        "tuning": "errors arrays files cohort statistics visualization splits config bags training evaluation runs "
        "experiments",
        "deployment": "errors arrays files cohort statistics splits bags training evaluation runs",
        "demo": "errors statistics config training runs experiments deployment",
        "__init__": "errors cohort statistics config training evaluation runs reports experiments tuning deployment",
        "cli": "",
        "cli/console": "evaluation cli",
        "cli/slides": "files visualization cli/console",
        "cli/heads": "errors files cohort statistics config bags training evaluation runs reports experiments tuning "
        "deployment demo cli/console cli/slides",
        "cli/main": "cli cli/slides cli/heads",
        "cli/start": "cli cli/main",
        "__main__": "cli/start",
    },
}
"""Package → room → the rooms that it imports; it may import only what stands before it."""

MAY_IMPORT = {"extract": {"extract"}, "aggregators": {"aggregators"}, "mil": {"mil", "extract", "aggregators"}}

TORCH_FREE = {"errors", "exports", "geometry", "memory", "store", "store/core"}
"""Rooms of extract that mil imports anywhere."""

RUNS_EXTRACTION = {"visualization", "deployment", "demo", "cli/slides", "cli/heads", "cli/main"}
"""Rooms of mil that may import the rest of extract too, inside functions."""

MOST_FILES, MOST_LINES = 12, 400
"""Of a room, and of a file that does not say in its head why it is longer."""


class House:
    """The imports of a checkout.

    Args:
        root: holds the packages.
        rooms: the rooms that there are to be.
    """

    def __init__(self, root: Path, rooms: dict[str, dict[str, str]]) -> None:
        self.root, self.rooms = root, rooms

    @cached_property
    def modules(self) -> dict[str, Path]:
        """Dotted name → file; ``__init__`` is the package itself."""
        found = {}
        for package in MAY_IMPORT:
            for path in sorted((self.root / package).rglob("*.py")):
                parts = path.relative_to(self.root).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
        return found

    def room_of(self, module: str) -> str:
        """A room by its path below the package: the file's own, or its folder."""
        path = self.modules[module].relative_to(self.root)
        own = "/".join(path.with_suffix("").parts[1:])
        return own if own in self.rooms.get(path.parts[0], {}) or len(path.parts) == 2 else "/".join(path.parts[1:-1])

    @cached_property
    def imports(self) -> dict[str, dict[str, bool]]:
        """Module → module that it imports → whether always inside a function."""
        found: dict[str, dict[str, bool]] = {}
        for module, path in self.modules.items():
            targets: dict[str, bool] = {}
            for target, inside in self._imports_of(module, path):
                if target != module:
                    targets[target] = targets.get(target, True) and inside
            found[module] = targets
        return found

    def _imports_of(self, module: str, path: Path) -> Iterator[tuple[str, bool]]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        inside = {id(child) for function in functions for child in ast.walk(function)}
        described = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                source = ".".join([*base, *([node.module] if node.module else [])])
                names = [f"{source}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in described:
                # a name in a table of lazy exports, or in code for another process
                names = re.findall(r"(?<![\w./`])(?:mil|extract|aggregators)(?:\.\w+)+", node.value)
            lazy = id(node) in inside or isinstance(node, ast.Constant)
            yield from ((name, lazy) for name in map(self._module_of, names) if name is not None)

    def _module_of(self, dotted: str) -> str | None:
        """The module that a dotted name is in; the bare package only where it is named whole."""
        name = dotted
        while name not in self.modules and "." in name:
            name = name.rpartition(".")[0]
        return name if name in self.modules else None

    def breaches(self) -> Iterator[str]:
        """Every import across packages, upward, in a circle, or that the table does not say."""
        for module, targets in self.imports.items():
            yield from self._across(module, targets)
        for package, table in self.rooms.items():
            used: dict[str, set[str]] = {self.room_of(name): set() for name in self.modules if _is_in(name, package)}
            for module, targets in self.imports.items():
                if _is_in(module, package):
                    inner = {self.room_of(target) for target in targets if _is_in(target, package)}
                    used[self.room_of(module)] |= inner - {self.room_of(module)}
            yield from _compare(package, table, used)
        yield from self._circles()

    def _across(self, module: str, targets: dict[str, bool]) -> Iterator[str]:
        package, room = module.split(".")[0], self.room_of(module)
        for target, inside in targets.items():
            other = target.split(".")[0]
            if other not in MAY_IMPORT[package]:
                yield f"{module} imports {target}: {package} imports {sorted(MAY_IMPORT[package])} only"
            elif package == "mil" and other == "extract" and self.room_of(target) not in TORCH_FREE:
                if room not in RUNS_EXTRACTION:
                    yield f"{module} imports {target}: only the rooms {sorted(RUNS_EXTRACTION)} may"
                elif not inside:
                    yield f"{module} imports {target}: inside a function only"

    def _circles(self) -> Iterator[str]:
        try:
            graphlib.TopologicalSorter(self.imports).prepare()
        except graphlib.CycleError as error:
            yield f"a circle: {' ← '.join(error.args[1])}"


def _is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _compare(package: str, table: dict[str, str], used: dict[str, set[str]]) -> Iterator[str]:
    """Rooms beside the table: what has no place, what goes upward, what is not said, and what is said for nothing."""
    order = list(table)
    for room, found in used.items():
        if room not in table:
            yield f"{package}/{room} has no place in ROOMS"
            continue
        said = set(table[room].split())
        for other in sorted(found):
            if other in order and order.index(other) > order.index(room):
                yield f"{package}/{room} imports {package}/{other}: upward"
            elif other not in said:
                yield f"{package}/{room} imports {package}/{other}, which ROOMS does not say"
        yield from (f"{package}/{room} does not import {package}/{other}" for other in sorted(said - found))
    yield from (f"{package}/{room} is not there" for room in order if room not in used)


def test_no_import_goes_upward_or_across() -> None:
    assert list(House(REPOSITORY, ROOMS).breaches()) == []


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_and_files_are_small(package: str) -> None:
    house = House(REPOSITORY, ROOMS)
    files: dict[str, int] = {}
    for module, path in house.modules.items():
        if not _is_in(module, package):
            continue
        text = path.read_text(encoding="utf-8")
        reason = re.search(r'^"""[^"]*\b(longer than 400 lines because)\b', text)
        assert len(text.splitlines()) <= MOST_LINES or reason, f"{module}: a file of its length needs a reason"
        if path.name != "__init__.py":
            files[path.parent.as_posix()] = files.get(path.parent.as_posix(), 0) + 1
    assert max(files.values()) <= MOST_FILES, files


TABLE = {
    "extract": {"errors": "", "geometry": "errors", "store": "errors", "pipeline": "store", "__init__": "pipeline"},
    "mil": {"errors": "", "bags": "errors", "cli": "", "cli/slides": "bags", "cli/main": "cli/slides", "__init__": ""},
}

GOOD = {
    "extract/__init__.py": "HOME = {'run': 'extract.pipeline.run'}",
    "extract/errors.py": "import os",
    "extract/geometry.py": "from extract.errors import X",
    "extract/store/__init__.py": '"""See `extract.pipeline`."""\nfrom extract.store.base import B\nfrom . import base',
    "extract/store/base.py": "from ..errors import X",
    "extract/pipeline/__init__.py": "",
    "extract/pipeline/run.py": "from extract import store\nimport torch",
    "aggregators/__init__.py": "from aggregators.abmil import A",
    "aggregators/abmil.py": "def f():\n    from aggregators import base",
    "aggregators/base.py": "",
    "mil/__init__.py": "",
    "mil/errors.py": "",
    "mil/bags/__init__.py": "",
    "mil/bags/bags.py": "from extract.store import open_store\nimport aggregators.base\nfrom mil import errors",
    "mil/cli/__init__.py": "",
    "mil/cli/main.py": "from mil.cli.slides import plan",
    "mil/cli/slides/__init__.py": "",
    "mil/cli/slides/plan.py": "def extract():\n    from extract.pipeline.run import run\n    import mil.bags.bags",
}

BREACHES = [
    ("extract/errors.py", "from extract.geometry import Y", "extract/errors imports extract/geometry: upward"),
    ("extract/errors.py", "from .geometry import Y", "extract/errors imports extract/geometry: upward"),
    ("extract/errors.py", "from . import geometry", "extract/errors imports extract/geometry: upward"),
    ("extract/errors.py", "def f():\n    import extract.pipeline.run",
     "extract/errors imports extract/pipeline: upward"),
    ("extract/errors.py", "CODE = 'import extract.pipeline.run'", "extract/errors imports extract/pipeline: upward"),
    ("extract/store/base.py", "from extract.errors import X\nfrom extract.geometry import Y", "extract/store imports"),
    ("extract/store/base.py", "from . import B\nfrom ..errors import X", "a circle: extract.store"),
    ("extract/store/base.py", "", "extract/store does not import extract/errors"),
    ("extract/pipeline/run.py", "from extract import store\nimport mil", "extract.pipeline.run imports mil: extract"),
    ("extract/pipeline/run.py", "import extract.store\nCODE = 'from mil.bags import B'",
     "extract.pipeline.run imports mil.bags"),
    ("extract/pipeline/run.py", "import extract.store\ndef f():\n    from aggregators import A",
     "extract.pipeline.run imports"),
    ("aggregators/base.py", "import extract.store", "aggregators.base imports extract.store"),
    ("aggregators/base.py", "from mil import errors", "aggregators.base imports mil.errors"),
    ("aggregators/base.py", "from aggregators.abmil import A", "a circle: aggregators"),
    ("mil/errors.py", "import mil.bags.bags", "mil/errors imports mil/bags: upward"),
    ("mil/bags/bags.py", "import mil.errors\nimport extract.pipeline.run",
     "mil.bags.bags imports extract.pipeline.run: only"),
    ("mil/bags/bags.py", "import mil.errors\ndef f():\n    from extract import run",
     "mil.bags.bags imports extract: only"),
    ("mil/cli/slides/plan.py", "import mil.bags.bags\nfrom extract.pipeline.run import r",
     "mil.cli.slides.plan imports extract"),
    ("mil/cli/slides/plan.py", "import mil.bags.bags\nfrom mil.cli import main",
     "mil/cli/slides imports mil/cli/main: upward"),
    ("mil/novelty.py", "", "mil/novelty has no place in ROOMS"),
    ("mil/novelties/one.py", "", "mil/novelties has no place in ROOMS"),
]  # fmt: skip


def build(root: Path, files: dict[str, str]) -> House:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return House(root, TABLE)


@pytest.mark.parametrize(("file", "text", "breach"), BREACHES)
def test_a_breach_is_found(tmp_path: Path, file: str, text: str, breach: str) -> None:
    found = list(build(tmp_path, GOOD | {file: text}).breaches())
    assert any(each.startswith(breach) for each in found), found


def test_what_is_allowed_is_no_breach(tmp_path: Path) -> None:
    assert list(build(tmp_path, GOOD).breaches()) == []
