"""What every store is: a folder of committed units, one pair per slide, and readers that copy nothing.

A *tiles unit* says where a slide was cut; a *features unit* holds one embedding per tile. A unit is complete exactly
when it is at its final path with a commit record inside; anything else does not exist.

Everything but the layout of bytes is written here: recipes, checks, records, checksums, names. A backend says how a
unit is built at a path, and how its record and its arrays are read back.
"""

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np

from extract.errors import (
    EntryNotFoundError,
    RecipeMismatchError,
    SlideNotFoundError,
    StoreError,
    StoreUnreachableError,
    UnitCorruptError,
)
from extract.store.core.draft import Draft, clear_draft, is_claimed
from extract.store.core.files import (
    clear_when_full,
    commit,
    discard,
    disk_bytes,
    identity,
    make_folder,
    members,
    replace_json,
)
from extract.store.core.fingerprint import difference, fingerprint, to_dict
from extract.store.core.ids import decode_id, encode_id
from extract.store.core.index import Index, Line
from extract.store.core.recipes import Execution, FeatureRecipe, TileRecipe, from_dict, tiles_text
from extract.store.core.remote_path import store_path
from extract.store.core.run_log import RunLog
from extract.store.core.slide_reader import SlideReader
from extract.store.core.unit import (
    TilesUnit,
    features_record,
    has_checksum,
    tiles_arrays,
    tiles_record,
)

__all__ = ["FORMAT", "Mode", "SlideReader", "Store", "TilesUnit", "decode_id", "encode_id"]
FORMAT = 1

Mode = Literal["r", "r+"]
"""``r``: reading only; ``r+``: writing too."""

_ENTRY_NAME = re.compile(r"(?!zarr\.json$)[a-z0-9][a-z0-9._-]*(@(view-[0-9]+|context-[0-9.]+))?")


class Store(ABC):
    """A cohort of slides, cut once, embedded by any number of backbones.

    Open one with `extract.store.open_store`, make one with `extract.store.create_store`.

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

    def __init__(self, path: str | Path, mode: Mode = "r+") -> None:
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

    @classmethod
    def create(cls, path: Path, recipe: TileRecipe) -> Self:
        """Open the store at ``path`` for writing, or make it.

        Raises:
            RecipeMismatchError: the store was cut by another recipe; the message names the fields.
            StoreError: the path is something else.
        """
        if (path / cls.root_name).is_file():
            store = cls(path)
            changes = difference(store.tile_recipe, recipe)
            if changes and not store.unit_paths():
                # nothing was cut yet, as when every slide was refused: the first slide decides
                replace_json(path / cls.root_name, cls._wrap(cls._root_record(recipe)))
                return cls.create(path, recipe)
            if changes:
                raise RecipeMismatchError(
                    f"got a tile recipe unlike that of store {path} (there → now): {'; '.join(changes)} → one store "
                    f"holds one recipe → repeat the settings of the store, or choose another --store"
                )
            with clear_when_full(path):
                store._make_folders()
            return store
        strange = path.exists() and (not path.is_dir() or any(not each.name.startswith("~") for each in path.iterdir()))
        # another worker may just have made it
        if strange and not (path / cls.root_name).is_file():
            raise StoreError(f"got {path} as store → it exists and is not a store → choose another --store")
        with clear_when_full(path):
            make_folder(path)
            replace_json(path / cls.root_name, cls._wrap(cls._root_record(recipe)))
        # whoever made it at the same moment, with whatever recipe: from here on it is like any other store
        return cls.create(path, recipe)

    # ---------------------------------------------------------------- what a backend says

    @staticmethod
    @abstractmethod
    def _wrap(record: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON document that holds the record of the store or of an entry."""

    @staticmethod
    @abstractmethod
    def _unwrap(document: Any) -> dict[str, Any]:
        """The record in such a document; LookupError or TypeError if there is none."""

    @classmethod
    def _root_record(cls, recipe: TileRecipe) -> dict[str, Any]:
        return {"format": FORMAT, "tile_recipe": to_dict(recipe), "fingerprint": fingerprint(recipe)}

    @abstractmethod
    def _unit_names(self, folder: Path) -> list[str]:
        """Sorted encoded ids of the units in a folder, complete or not; empty if the folder is absent."""

    @abstractmethod
    def _read_record(self, unit: Path) -> dict[str, Any]:
        """The record of a unit.

        Raises:
            UnitCorruptError: it cannot be read.
        """

    @abstractmethod
    def _read_array(self, unit: Path, name: str, rows: slice | np.ndarray | None = None) -> np.ndarray:
        """An array of a unit, or some of its rows; mapped, not copied, where that is possible.

        Args:
            unit: path of the unit.
            name: ``coords``, ``tissue_fraction``, ``thumbnail``, ``tissue_mask`` or ``features``.
            rows: what `row_index` returned; None for all.

        Raises:
            UnitCorruptError: it is absent or damaged.
        """

    @abstractmethod
    def _build_tiles(self, partial: Path, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Write a tiles unit at a path where there is nothing, and close it."""

    @abstractmethod
    def _build_features(self, partial: Path, record: Mapping[str, Any], matrix: np.ndarray) -> None:
        """Write a features unit at a path where there is nothing, and close it."""

    def _make_folders(self) -> None:
        """Make ``tiles`` and ``features``; whoever is killed before leaves this to the next."""
        for name in ("tiles", "features"):
            (self.path / name).mkdir(exist_ok=True)

    # ---------------------------------------------------------------- what a store that lies on no disk does otherwise

    def _commit(self, final: Path, build: Callable[[Path], None], needed_bytes: int) -> None:
        """Let a unit be built and put it in its place; the second of two changes nothing."""
        commit(final, build, needed_bytes)

    def _make_way(self, unit: Path, is_good: Callable[[], bool]) -> None:
        """Take away what lies at the path of a unit, unless it is good; never what another writer puts there."""
        with suppress(FileNotFoundError):
            there = identity(unit)
            if not is_good():
                discard(unit, there)

    def _is_complete(self, unit: Path) -> bool:
        """Whether a unit with a record lies at this path."""
        return os.path.isfile(f"{unit}{self.record_suffix}")

    def _age(self, unit: str) -> int | None:
        """A number that changes when the unit at this path below the store is written anew; None where none is."""
        try:
            return os.stat(f"{self._prefix}{unit}{self.record_suffix}").st_mtime_ns
        except (FileNotFoundError, NotADirectoryError):
            return None

    def size_of(self, path: Path) -> int:
        """Bytes of a unit, or of anything else in the store; 0 for what is not there."""
        return disk_bytes(path)

    # what a backend repeats in a features unit beside the matrix has to be checked with it
    def _verify_extras(self, slide: SlideReader, entry: str) -> None:  # noqa: B027
        """Check what a features unit holds beside its matrix.

        Raises:
            UnitCorruptError: it is not what the slide's tiles say.
        """

    # ---------------------------------------------------------------- paths

    def tiles_path(self, slide_id: str) -> Path:
        """Where the tiles unit of a slide lies, or would lie."""
        return self.path / "tiles" / f"{encode_id(slide_id)}{self.suffix}"

    def feature_path(self, slide_id: str, entry: str) -> Path:
        """Where the features unit of a slide lies, or would lie."""
        return self._folder(entry) / f"{encode_id(slide_id)}{self.suffix}"

    def unit_paths(self, entry: str | None = None) -> dict[str, Path]:
        """Slide id to path of every unit that is there, complete or damaged: of tiles, or of an entry's features.

        A unit with a long id whose record cannot be read appears under its file name.
        """
        if entry is not None:
            self.feature_recipe(entry)
        folder = self._folder(entry)
        units = {name: folder / f"{name}{self.suffix}" for name in self._unit_names(folder)}
        return {self._id_of(name, unit) or name: unit for name, unit in units.items()}

    def leftovers(self) -> list[Path]:
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
        if not _ENTRY_NAME.fullmatch(entry) or not (self._folder(entry) / self.entry_name).is_file():
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

    # ---------------------------------------------------------------- writing

    def create_entry(self, entry: str, recipe: FeatureRecipe) -> None:
        """Make the entry, or check that it was made by the same recipe.

        Raises:
            RecipeMismatchError: it was not; the message names the fields.
            StoreError: the name is not ``[a-z0-9._-]`` with an optional ``@view-k`` or ``@context-mpp``.
        """
        self._check_writable()
        if not _ENTRY_NAME.fullmatch(entry):
            raise StoreError(
                f"got entry name {entry!r} → small letters, digits and . _ - are allowed → choose another --as"
            )
        metadata = self._folder(entry) / self.entry_name
        if not metadata.is_file():
            with clear_when_full(metadata):
                metadata.parent.mkdir(parents=True, exist_ok=True)
                record = {"feature_recipe": to_dict(recipe), "fingerprint": fingerprint(recipe)}
                replace_json(metadata, self._wrap(record))
                self._forms.pop(entry, None)
        if changes := difference(self.feature_recipe(entry), recipe):
            raise RecipeMismatchError(
                f"got a feature recipe unlike that of entry {entry!r} in {self.path} (there → now): "
                f"{'; '.join(changes)} → "
                f"one entry holds one recipe → name another entry with --as, or repeat the settings"
            )

    def write_tiles(self, unit: TilesUnit) -> None:
        """Commit where a slide was cut. A unit that is already there stays as it is.

        Raises:
            StoreFullError: no space left; the store is as it was.
        """
        arrays = tiles_arrays(unit)
        self.commit_tiles(tiles_record(unit, arrays), arrays)

    def write_features(
        self,
        entry: str,
        slide_id: str,
        features: np.ndarray,
        invalid_rows: list[int],
        execution: Execution,
        flagged_rows: Mapping[str, list[int]] | None = None,
    ) -> None:
        """Commit a slide's embeddings. A unit of the same tiles that is already there stays as it is.

        Args:
            entry: name of an entry made by `create_entry`.
            slide_id: a slide whose tiles are committed.
            features: [n_tiles, dim] in the entry's dtype, finite, invalid rows zero.
            invalid_rows: rows whose tile could not be decoded.
            execution: how they were computed.
            flagged_rows: rows of each quality flag (blurred, empty, pen), where they were looked for.

        Raises:
            StoreFullError: no space left; the store is as it was.
            StoreError: shape or dtype do not fit the tiles and the recipe.
        """
        matrix = np.ascontiguousarray(features)
        record = features_record(self[slide_id].record, matrix, invalid_rows, execution, flagged_rows)
        self.commit_features(entry, record, matrix)

    def commit_tiles(self, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Commit a tiles unit whose record is there already, as that of another store.

        Args:
            record: as `SlideReader.record`; it goes in unchanged.
            arrays: contiguous, by name, as its checksums count them.

        Raises:
            StoreFullError: no space left; the store is as it was.
            UnitCorruptError: the arrays do not match the checksums.
            RecipeMismatchError: another worker made the store its own, by another recipe, while it was empty.
        """
        self._check_writable()
        slide_id = str(record["slide_id"])

        def build(partial: Path) -> None:
            self._build_tiles(partial, record, arrays)
            for name, checksum in record["sha256"].items():
                _check_written(self._read_array(partial, name), checksum, slide_id)
            self._check_recipe()

        final = self.tiles_path(slide_id)
        # a folder that has lost its record is no unit, and would be in the way of one; a record that may not be read is
        # there, and this raises
        self._make_way(final, lambda: self._age(str(final)[len(self._prefix) :]) is not None)
        self._commit(final, build, sum(array.nbytes for array in arrays.values()))

    def commit_features(self, entry: str, record: Mapping[str, Any], matrix: np.ndarray) -> None:
        """Commit a features unit whose record is there already; see `commit_tiles`.

        Args:
            entry: name of an entry made by `create_entry`.
            record: as `SlideReader.feature_record`; it goes in unchanged.
            matrix: contiguous [n_tiles, dim], invalid rows zero.
        """
        self._check_writable()
        slide_id = str(record["slide_id"])
        recipe, n = self.feature_recipe(entry), self[slide_id].n_tiles
        expected = ((n, recipe.dim), recipe.dtype)
        if (matrix.shape, matrix.dtype.name) != expected:
            raise StoreError(f"got features {matrix.shape} {matrix.dtype} of slide {slide_id!r} → expected {expected}")

        def build(partial: Path) -> None:
            self._build_features(partial, record, matrix)
            written = self._read_array(partial, "features")
            _check_written(written, record["sha256"], slide_id)
            if not np.isfinite(written).all():
                raise StoreError(f"got features of slide {slide_id!r} that are not finite → they are not stored")

        final = self.feature_path(slide_id, entry)
        self._make_way(final, lambda: self.has_features(slide_id, entry))
        self._commit(final, build, matrix.nbytes)

    def draft(self, entry: str, slide_id: str, execution: Execution) -> Draft:
        """Begin to compute a slide's embeddings, or go on where a killed run stopped.

        Args:
            entry: name of an entry made by `create_entry`.
            slide_id: a slide whose tiles are committed.
            execution: how they will be computed; rows that were computed otherwise are not taken over.

        Raises:
            SlideClaimedError: another process is at work on it.
            StoreFullError: no space left.
        """
        self._check_writable()
        recipe = self.feature_recipe(entry)
        subject = {
            "features": fingerprint(recipe),
            "tiles": fingerprint(self[slide_id].record),
            "execution": fingerprint(execution),
        }
        return Draft.open(self.feature_path(slide_id, entry), subject, recipe.dim, recipe.dtype)

    def clear_draft(self, slide_id: str, entry: str) -> None:
        """Remove what a killed run left beside embeddings that are complete."""
        self._check_writable()
        clear_draft(self.feature_path(slide_id, entry))

    def is_claimed(self, slide_id: str, entry: str) -> bool:
        """Whether another process is at work on a slide's embeddings."""
        return is_claimed(self.feature_path(slide_id, entry))

    def write_index(self, anew: bool = False) -> None:
        """Write ``index.json``, by which the store is listed faster; see `extract.store.core.index`.

        Where it cannot be written, nothing is lost but time.

        Args:
            anew: from the records alone, whatever the index says now.
        """
        self._check_writable()
        if anew:
            self._index.clear()
        units = [
            unit.relative_to(self.path).as_posix()
            for entry in (None, *self.entries())
            for unit in self.unit_paths(entry).values()
        ]
        # a unit that may not be read is for others to tell
        with suppress(OSError):
            self._index.write([unit for unit in units if self._line(unit) is not None])

    def start_run(self) -> RunLog:
        """Open a new log of this run under ``runs/``."""
        self._check_writable()
        return RunLog(self.path / "runs")

    # ---------------------------------------------------------------- within

    def _form_of(self, entry: str) -> tuple[int, str]:
        """Width and dtype of an entry's rows; its record is read once, since every read of a matrix asks."""
        if entry not in self._forms:
            recipe = self.feature_recipe(entry)
            self._forms[entry] = recipe.dim, recipe.dtype
        return self._forms[entry]

    def _folder(self, entry: str | None) -> Path:
        return self.path / "tiles" if entry is None else self.path / "features" / entry

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

    def _id_of(self, name: str, unit: Path) -> str | None:
        """The slide id of a unit, from its file name or its record; None when neither tells."""
        slide_id = decode_id(name)
        if slide_id is not None:
            return slide_id
        try:
            return str(self._read_record(unit)["slide_id"])
        except (StoreError, LookupError):
            return None

    def _read_group(self, file: Path) -> dict[str, Any]:
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

    def _check_writable(self) -> None:
        if self.mode == "r":
            raise StoreError(
                f"got store {self.path} opened for reading → writing needs mode 'r+' → open_store(path, 'r+')"
            )

    def _check_recipe(self) -> None:
        """An empty store takes the recipe of whoever opens it next: nobody else may cut slides into it then."""
        now = from_dict(TileRecipe, self._read_group(self.path / self.root_name)["tile_recipe"])
        if changes := difference(now, self.tile_recipe):
            raise RecipeMismatchError(
                f"got slides to put into store {self.path}, which another process has begun with other settings since "
                f"(there → here): {'; '.join(changes)} → one store holds one recipe → choose another --store"
            )

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


def _unreadable(file: Path, error: Exception) -> UnitCorruptError:
    return UnitCorruptError(f"got {file} → it is damaged or not ours ({error!r}) → run mil store verify to see the fix")


def _check_written(array: np.ndarray, checksum: str, slide_id: str) -> None:
    if not has_checksum(array, checksum):
        raise UnitCorruptError(f"got other bytes back than were written for slide {slide_id!r} → check the disk")
