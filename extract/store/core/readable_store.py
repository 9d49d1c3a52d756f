"""What every store holds, and how it is found, listed and read: units, entries and their records.

The layout of bytes is a backend's: it says how a unit's record and its arrays are read back.
"""

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, ClassVar, Literal

import numpy as np

from extract.errors import (
    EntryNotFoundError,
    SlideNotFoundError,
    StoreError,
    StoreUnreachableError,
    UnitCorruptError,
)
from extract.store.core.files import disk_bytes, members
from extract.store.core.fingerprint import fingerprint
from extract.store.core.index import Index, Line
from extract.store.core.recipes import FeatureRecipe, TileRecipe, from_dict, tiles_text
from extract.store.core.remote_path import StorePath, local_path, store_path
from extract.store.core.slide_reader import SlideReader
from extract.store.core.unit import decode_id, encode_id

FORMAT = 1

Mode = Literal["r", "r+"]
"""``r``: reading only; ``r+``: writing too."""

ENTRY_NAME = re.compile(r"(?!zarr\.json$)[a-z0-9][a-z0-9._-]*(@(view-[0-9]+|context-[0-9.]+))?")


class ReadableStore(ABC):
    """The reading side of a store; `extract.store.core.store.Store` adds the writing side.

    Attributes:
        path: the folder.
        mode: ``r``, or ``r+`` where it may be written.
        tile_recipe: how its slides are cut.
        format: the backend's name, ``zarr`` or ``h5``.
    """

    format: ClassVar[str]
    suffix: ClassVar[str] = ""
    """What the path of a unit ends in."""
    root_name: ClassVar[str]
    """File that holds the record of the store."""
    entry_name: ClassVar[str]
    """File that holds the record of an entry."""
    record_suffix: ClassVar[str] = ""
    """What is added to the path of a unit to get that of the file which holds its record."""

    def __init__(self, path: str | StorePath, mode: Mode = "r+") -> None:
        if mode not in ("r", "r+"):
            raise StoreError(f"got mode {mode!r} → expected 'r' (reading) or 'r+' (writing too) → choose one of these")
        self.path, self.mode = store_path(path), mode
        self._index, self._prefix = Index(self.path / "index.json"), os.path.join(str(self.path), "")
        self._forms: dict[str, tuple[int, str]] = {}
        record = self._read_group(self.path / self.root_name)
        if record.get("format") != FORMAT:
            raise StoreError(
                f"got store format {record.get('format')!r} in {path} → this version reads format {FORMAT} → "
                f"use the version that wrote it"
            )
        try:
            self.tile_recipe = from_dict(TileRecipe, record["tile_recipe"])
        except (LookupError, TypeError) as error:
            raise _unreadable(self.path / self.root_name, error) from error
        if record.get("fingerprint") != fingerprint(self.tile_recipe):
            raise UnitCorruptError(
                f"got a tile recipe in {path} that does not match its fingerprint → it was edited by hand"
            )

    # ---------------------------------------------------------------- what a backend says

    @staticmethod
    @abstractmethod
    def _unwrap(document: Any) -> dict[str, Any]:
        """The record in such a document; LookupError or TypeError if there is none."""

    @abstractmethod
    def _unit_names(self, folder: StorePath) -> list[str]:
        """Sorted encoded ids of the units in a folder, complete or not; empty if the folder is absent."""

    @abstractmethod
    def _read_record(self, unit: StorePath) -> dict[str, Any]:
        """The record of a unit.

        Raises:
            UnitCorruptError: it cannot be read.
        """

    @abstractmethod
    def _read_array(self, unit: StorePath, name: str, rows: slice | np.ndarray | None = None) -> np.ndarray:
        """An array of a unit, or some of its rows; mapped, not copied, where that is possible.

        Args:
            unit: path of the unit.
            name: ``coords``, ``tissue_fraction``, ``thumbnail``, ``tissue_mask`` or ``features``.
            rows: what `row_index` returned; None for all.

        Raises:
            UnitCorruptError: it is absent or damaged.
        """

    def _is_complete(self, unit: StorePath) -> bool:
        """Whether a unit with a record lies at this path."""
        return os.path.isfile(f"{unit}{self.record_suffix}")

    def _age(self, unit: str) -> int | None:
        """A number that changes when the unit at this path below the store is written anew; None where none is."""
        try:
            return os.stat(f"{self._prefix}{unit}{self.record_suffix}").st_mtime_ns
        except (FileNotFoundError, NotADirectoryError):
            return None

    def size_of(self, path: StorePath) -> int:
        """Bytes of a unit, or of anything else in the store; 0 for what is not there."""
        return disk_bytes(local_path(path))

    # what a backend repeats in a features unit beside the matrix has to be checked with it
    def _verify_extras(self, slide: SlideReader, entry: str) -> None:  # noqa: B027
        """Check what a features unit holds beside its matrix.

        Raises:
            UnitCorruptError: it is not what the slide's tiles say.
        """

    # ---------------------------------------------------------------- paths

    def tiles_path(self, slide_id: str) -> StorePath:
        """Where the tiles unit of a slide lies, or would lie."""
        return self.path / "tiles" / f"{encode_id(slide_id)}{self.suffix}"

    def feature_path(self, slide_id: str, entry: str) -> StorePath:
        """Where the features unit of a slide lies, or would lie."""
        return self._folder(entry) / f"{encode_id(slide_id)}{self.suffix}"

    def unit_paths(self, entry: str | None = None) -> dict[str, StorePath]:
        """Slide id to path of every unit that is there, complete or damaged: of tiles, or of an entry's features.

        A unit with a long id whose record cannot be read appears under its file name.
        """
        if entry is not None:
            self.feature_recipe(entry)
        folder = self._folder(entry)
        units = {name: folder / f"{name}{self.suffix}" for name in self._unit_names(folder)}
        return {self._id_of(name, unit) or name: unit for name, unit in units.items()}

    def leftovers(self) -> list[StorePath]:
        """What dead writers left: half-built units, drafts and their rows. Some may belong to a writer at work."""
        folders = [self.path, *(self._folder(entry) for entry in (None, *self.entries())), self.path / "features"]
        return sorted({path for folder in folders for path in folder.glob("~*")})

    # ---------------------------------------------------------------- reading

    def entries(self) -> list[str]:
        """Names of the features entries."""
        folder = self.path / "features"
        return [name for name in members(folder) if (folder / name / self.entry_name).is_file()]

    def feature_recipe(self, entry: str) -> FeatureRecipe:
        """The recipe of an entry.

        Raises:
            EntryNotFoundError: no such entry; the message lists those there are.
        """
        if not ENTRY_NAME.fullmatch(entry) or not (self._folder(entry) / self.entry_name).is_file():
            raise self._no_entry(entry)
        record = self._read_group(self._folder(entry) / self.entry_name)
        try:
            recipe = from_dict(FeatureRecipe, record["feature_recipe"])
        except (LookupError, TypeError) as error:
            raise _unreadable(self._folder(entry) / self.entry_name, error) from error
        if record.get("fingerprint") != fingerprint(recipe):
            raise UnitCorruptError(
                f"got a feature recipe of entry {entry!r} in {self.path} that does not match its fingerprint → it was "
                f"edited by hand"
            )
        return recipe

    def dim(self, entry: str) -> int:
        """Features per tile."""
        return self.feature_recipe(entry).dim

    def slide_ids(self, entry: str | None = None) -> list[str]:
        """Sorted ids of the slides with complete tiles, or with complete features in ``entry``."""
        units = self.unit_paths(entry)
        if entry is None:
            return sorted(slide_id for slide_id, unit in units.items() if self._is_complete(unit))
        return sorted(slide_id for slide_id in units if self._listed(slide_id, entry) is not None)

    def n_tiles(self, slide_id: str, entry: str) -> int:
        """Rows that ``features(entry)`` of the slide will have, without reading them."""
        line = self._listed(slide_id, entry)
        if line is not None:
            return line.n_tiles - line.n_invalid
        # raises what is wrong with them
        record = self[slide_id].feature_record(entry)
        return int(record["n_tiles"]) - len(record["invalid_rows"])

    def has_features(self, slide_id: str, entry: str) -> bool:
        """Whether the slide has complete features in ``entry`` that were made from its present tiles."""
        if slide_id not in self or not self._is_complete(self.feature_path(slide_id, entry)):
            return False
        try:
            self[slide_id].feature_record(entry)
        except StoreUnreachableError:
            raise
        except StoreError:
            # damaged, or just being replaced by another writer
            return False
        return True

    def __getitem__(self, slide_id: str) -> SlideReader:
        """Open one slide.

        Raises:
            SlideNotFoundError: the store holds no such slide.
            UnitCorruptError: its tiles have no record, or none that may be read.
        """
        if slide_id not in self:
            # at a URL a unit is what has a record
            if isinstance(slide_id, str) and slide_id and os.path.exists(str(self.tiles_path(slide_id))):
                raise UnitCorruptError(
                    f"got slide {slide_id!r} whose tiles have no record that can be read → the files were damaged, or "
                    f"may not be read → mil store verify {self.path} shows the fix"
                )
            raise self._no_slide(slide_id)
        return SlideReader(self, slide_id)

    def __len__(self) -> int:
        return len(self.slide_ids())

    def __iter__(self) -> Iterator[str]:
        return iter(self.slide_ids())

    def __contains__(self, slide_id: object) -> bool:
        return isinstance(slide_id, str) and bool(slide_id) and self._is_complete(self.tiles_path(slide_id))

    def __repr__(self) -> str:
        n, tiles = len(self), tiles_text(self.tile_recipe)
        lines = [f"{type(self).__name__}({str(self.path)!r}, {n} slide{'' if n == 1 else 's'}, tiles of {tiles})"]
        for entry in self.entries():
            made = self.feature_recipe(entry)
            lines.append(f"  {entry}: {len(self.slide_ids(entry))} slides, {made.dtype} [n, {made.dim}]")
        return "\n".join(lines if len(lines) > 1 else [*lines, "  no features"])

    # ---------------------------------------------------------------- within

    def _folder(self, entry: str | None) -> StorePath:
        return self.path / "tiles" if entry is None else self.path / "features" / entry

    def _form_of(self, entry: str) -> tuple[int, str]:
        """Width and dtype of an entry's rows; its record is read once, since every read of a matrix asks."""
        if entry not in self._forms:
            recipe = self.feature_recipe(entry)
            self._forms[entry] = recipe.dim, recipe.dtype
        return self._forms[entry]

    def _listed(self, slide_id: str, entry: str) -> Line | None:
        """What is listed of a slide's features, or None unless they are complete and of its present tiles."""
        name = f"{encode_id(slide_id)}{self.suffix}"
        line, tiles = self._line(f"features/{entry}/{name}"), self._line(f"tiles/{name}")
        return line if line is not None and tiles is not None and line.tiles == tiles.tiles else None

    def _line(self, unit: str) -> Line | None:
        """What is listed of a unit, from the index or from its record; None where there is no usable record.

        Args:
            unit: its path below the store; text, since a `Path` takes longer to make than a line to look up.
        """
        age = self._age(unit)
        if age is None:
            return None
        line = self._index.get(unit, age)
        if line is None:
            try:
                line = Line.of(self._read_record(self.path / unit))
            except (StoreError, LookupError, TypeError):
                return None
            self._index.put(unit, age, line)
        return line

    def _id_of(self, name: str, unit: StorePath) -> str | None:
        """The slide id of a unit, from its file name or its record; None when neither tells."""
        slide_id = decode_id(name)
        if slide_id is not None:
            return slide_id
        try:
            return str(self._read_record(unit)["slide_id"])
        except (StoreError, LookupError):
            return None

    def _read_group(self, file: StorePath) -> dict[str, Any]:
        """The record of the store or of an entry."""
        try:
            record = self._unwrap(json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise StoreError(f"got {file.parent} → there is no {file.name}: not a store") from error
        except (ValueError, LookupError, TypeError) as error:
            raise _unreadable(file, error) from error
        if not isinstance(record, dict):
            raise _unreadable(file, TypeError("no object"))
        return record

    def _no_entry(self, entry: str, slide_id: str | None = None) -> EntryNotFoundError:
        where = f"slide {slide_id!r} of store {self.path}" if slide_id else f"store {self.path}"
        there = self[slide_id].entries() if slide_id else self.entries()
        return EntryNotFoundError(
            f"got entry {entry!r} → {where} holds {there} → choose one of these, or run mil extract with it"
        )

    def _no_slide(self, slide_id: str) -> SlideNotFoundError:
        near = get_close_matches(str(slide_id), self.slide_ids(), n=3)
        hint = f"did you mean {near}?" if near else "list the ids with store.slide_ids()"
        return SlideNotFoundError(f"got slide {slide_id!r} → store {self.path} has no such slide → {hint}")


def _unreadable(file: StorePath, error: Exception) -> UnitCorruptError:
    return UnitCorruptError(f"got {file} → it is damaged or not ours ({error!r}) → run mil store verify to see the fix")
