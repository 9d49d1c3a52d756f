"""What the documents say of the code is true of it."""

import re
from pathlib import Path

import pytest

from docs import draw_rooms
from tests.conftest import REPOSITORY
from tests.test_layers import ROOMS

ARCHITECTURE = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
CONTRIBUTING = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_picture_of_the_rooms_is_that_of_the_imports() -> None:
    assert draw_rooms.FILE.read_text(encoding="utf-8") == draw_rooms.draw(), "call python -m docs.draw_rooms"


def test_every_arrow_is_an_import_and_every_import_is_implied() -> None:
    for package, rooms in draw_rooms.SHOWN.items():
        edges = draw_rooms.reduced(package)
        for room in rooms:
            reached, waiting = set[str](), [*edges[room]]
            while waiting:
                reached.add(waiting[-1])
                waiting += edges[waiting.pop()]
            assert {other for other in ROOMS[package][room].split() if other in rooms} <= reached
            assert edges[room] <= set(ROOMS[package][room].split())


def test_every_room_is_described() -> None:
    for package, rooms in ROOMS.items():
        folders = {room.split("/")[0] for room in rooms if (REPOSITORY / package / room).is_dir()}
        assert {name for name in folders if f"| `{name}/` |" not in ARCHITECTURE} == set()


@pytest.mark.parametrize("text", [ARCHITECTURE, CONTRIBUTING])
def test_every_file_that_is_named_is_there(text: str) -> None:
    names = re.findall(r"`([\w/]+\.py)`", text)
    files = [path.as_posix() for package in ("mil", "extract", "aggregators", "tests", "docs", "benchmarks")
             for path in Path(REPOSITORY / package).rglob("*.py")]  # fmt: skip
    assert names
    assert [name for name in names if not any(file.endswith(f"/{name}") for file in files)] == []
