"""Draw the rooms and what they import from the imports themselves: ``python -m docs.draw_rooms`` writes docs/rooms.svg.

An arrow points from a room to one that it imports; arrows that others imply are left out.
"""

import graphlib
from collections.abc import Mapping
from html import escape
from pathlib import Path

from tests.test_layers import ROOMS

FILE = Path(__file__).with_name("rooms.svg")
WIDTH, ROW, COLUMN, BOX = 1120, 58, 135, (112, 30)
SHOWN = {
    "extract": {
        "geometry": 2, "store/core": 1, "store/formats": 1, "store/upkeep": 1, "store": 1, "store/foreign": 0,
        "slides": 2.6, "synthetic": 3.3, "tiling": 2, "backbones": 1, "reading": 2, "pipeline": 1.5, "planning": 2,
    },
    "mil": {
        "cohort": 2, "statistics": 1, "visualization": 0, "splits": 2, "config": 3, "bags": 3, "training": 2,
        "evaluation": 1.5, "runs": 2, "reports": 1, "experiments": 2, "tuning": 2, "deployment": 3, "demo": 3,
        "cli/slides": 0, "cli/heads": 2, "cli/main": 1.5,
    },
}  # fmt: skip
"""What is drawn, and in which column; errors, arrays and other ground that all stand on is not."""

Point = tuple[float, float]


def main() -> None:
    """Write the picture."""
    FILE.write_text(draw(), encoding="utf-8")


def draw() -> str:
    """The picture as SVG."""
    extract, mil = (_floors(reduced(package)) for package in SHOWN)
    bottom = 60.0 + ROW * max(*extract.values(), *mil.values())
    drawn = [*_package("extract", 80, bottom), *_package("mil", 640, bottom)]
    height = bottom + 40
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'font-family="sans-serif" font-size="13">'
        "<title>The rooms of extract and mil, and what they import</title>"
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="#ffffff"/>'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#7a8794"/></marker></defs>'
    )
    return "\n".join([head, *drawn, "</svg>", ""])


def _package(package: str, left: float, bottom: float) -> list[str]:
    """The drawing of a package's rooms, from the ground up."""
    edges = reduced(package)
    floors = _floors(edges)
    places = {room: (left + COLUMN * SHOWN[package][room], bottom - ROW * floor) for room, floor in floors.items()}
    x, y = left + 1.5 * COLUMN, bottom - ROW * max(floors.values()) - 30
    title = f'<text x="{x:.0f}" y="{y:.0f}" font-size="17" text-anchor="middle" fill="#1f2a36">{package}/</text>'
    lines = [_arrow(places[room], places[other]) for room, found in edges.items() for other in sorted(found)]
    return [title, *lines, *(_box(room, places[room]) for room in edges)]


def reduced(package: str) -> dict[str, set[str]]:
    """Room → the shown rooms that it imports and that none of those imports in turn."""
    shown = SHOWN[package]
    table = {room: {other for other in ROOMS[package][room].split() if other in shown} for room in shown}
    implied = _implied(table)
    return {room: {o for o in found if not any(o in implied[via] for via in found)} for room, found in table.items()}


def _implied(table: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Room → all that it stands on."""
    found: dict[str, set[str]] = {}
    for room in graphlib.TopologicalSorter(table).static_order():
        found[room] = set(table[room]).union(*(found[other] for other in table[room]))
    return found


def _floors(edges: Mapping[str, set[str]]) -> dict[str, int]:
    """Room → one above the highest that it imports."""
    floors: dict[str, int] = {}
    for room in graphlib.TopologicalSorter(edges).static_order():
        floors[room] = max((floors[other] + 1 for other in edges[room]), default=0)
    return floors


def _arrow(start: Point, end: Point) -> str:
    y1, y2 = start[1] + BOX[1] / 2, end[1] - BOX[1] / 2
    bend = (y2 - y1) / 2
    path = f"M{start[0]:.0f} {y1:.0f}C{start[0]:.0f} {y1 + bend:.0f} {end[0]:.0f} {y2 - bend:.0f} {end[0]:.0f} {y2:.0f}"
    return f'<path d="{path}" fill="none" stroke="#7a8794" stroke-width="1.2" marker-end="url(#tip)"/>'


def _box(room: str, at: Point) -> str:
    x, y = at[0] - BOX[0] / 2, at[1] - BOX[1] / 2
    return (
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{BOX[0]}" height="{BOX[1]}" rx="6" fill="#eef3f8" stroke="#4a6785"/>'
        f'<text x="{at[0]:.0f}" y="{at[1] + 4.5:.1f}" text-anchor="middle" fill="#1f2a36">{escape(room)}</text>'
    )


if __name__ == "__main__":
    main()
