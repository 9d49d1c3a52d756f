"""``index.json``: what the records of all units say, so that a store of 10,000 slides is listed without reading each.

A cache, never the truth: a line counts while its unit is as old as when the line was made, and is made anew from the
unit's record otherwise. A store without an index, or with a damaged one, is listed in the same way, only slower.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

from extract.store.core.files import replace_json
from extract.store.core.fingerprint import fingerprint
from extract.store.core.remote_path import StorePath


@dataclass(frozen=True)
class Line:
    """What listing needs of a unit's record.

    Attributes:
        n_tiles: tiles of the slide.
        n_invalid: those that could not be decoded; 0 for a tiles unit.
        tiles: fingerprint of the record of a tiles unit, or of the tiles that a features unit was made from.
    """

    n_tiles: int
    n_invalid: int
    tiles: str

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """The line of a unit's record.

        Raises:
            LookupError, TypeError: it is no such record.
        """
        if "tiles_sha256" in record:
            return cls(int(record["n_tiles"]), len(record["invalid_rows"]), str(record["tiles_sha256"]))
        return cls(int(record["n_tiles"]), 0, fingerprint(record))


class Index:
    """The lines of a store's units, by the unit's path below the store and its age.

    Args:
        path: of ``index.json``; read when the first line is asked for.
    """

    def __init__(self, path: StorePath) -> None:
        self.path = path
        self._lines: dict[str, tuple[int, Line]] | None = None

    def get(self, unit: str, modified_ns: int) -> Line | None:
        """The line of a unit, or None when there is none of that age."""
        if self._lines is None:
            self._lines = _read(self.path)
        found = self._lines.get(unit)
        return found[1] if found is not None and found[0] == modified_ns else None

    def put(self, unit: str, modified_ns: int, line: Line) -> None:
        """Remember a line that was made from the unit's record."""
        if self._lines is None:
            self._lines = _read(self.path)
        self._lines[unit] = modified_ns, line

    def clear(self) -> None:
        """Forget every line."""
        self._lines = {}

    def write(self, units: Sequence[str]) -> None:
        """Write the file with the lines of these units, in one step.

        Raises:
            OSError: it cannot be written.
        """
        known = self._lines or {}
        lines = {
            unit: [modified_ns, line.n_tiles, line.n_invalid, line.tiles]
            for unit, (modified_ns, line) in ((unit, known[unit]) for unit in units if unit in known)
        }
        replace_json(self.path, {"tessera": {"format": 1, "units": lines}}, indent=None)


def _read(path: StorePath) -> dict[str, tuple[int, Line]]:
    lines: dict[str, tuple[int, Line]] = {}
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        units: dict[str, Any] = json.loads(path.read_bytes())["tessera"]["units"]
        for unit, (modified_ns, n_tiles, n_invalid, tiles) in units.items():
            lines[unit] = int(modified_ns), Line(int(n_tiles), int(n_invalid), str(tiles))
    return lines
