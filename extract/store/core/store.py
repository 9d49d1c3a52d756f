"""What every store is: a folder of committed units, one pair per slide, and readers that copy nothing.

A *tiles unit* says where a slide was cut; a *features unit* holds one embedding per tile. A unit is complete exactly
when it is at its final path with a commit record inside; anything else does not exist.

Everything but the layout of bytes is written here and in `extract.store.core.readable_store`: recipes, checks, records,
checksums, names. A backend says how a unit is built at a path, and how its record and its arrays are read back.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np

from extract.errors import RecipeMismatchError, StoreError, UnitCorruptError
from extract.store.core.draft import Draft, clear_draft, is_claimed
from extract.store.core.files import clear_when_full, commit, discard, identity, make_folder, replace_json
from extract.store.core.fingerprint import difference, fingerprint, to_dict
from extract.store.core.readable_store import ENTRY_NAME, FORMAT, ReadableStore
from extract.store.core.recipes import Execution, FeatureRecipe, TileRecipe, from_dict
from extract.store.core.remote_path import StorePath, local_path
from extract.store.core.run_log import RunLog
from extract.store.core.unit import TilesUnit, features_record, has_checksum, tiles_arrays, tiles_record


class Store(ReadableStore):
    """A cohort of slides, cut once, embedded by any number of backbones.

    Open one with `extract.store.open_store`, make one with `extract.store.create_store`. What is read from it is in
    `ReadableStore`.
    """

    @classmethod
    def create(cls, path: StorePath, recipe: TileRecipe) -> Self:
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

    def _commit(self, final: StorePath, build: Callable[[Path], None], needed_bytes: int) -> None:
        """Let a unit be built and put it in its place; the second of two changes nothing."""
        commit(local_path(final), build, needed_bytes)

    def _make_way(self, unit: StorePath, is_good: Callable[[], bool]) -> None:
        """Take away what lies at the path of a unit, unless it is good; never what another writer puts there."""
        with suppress(FileNotFoundError):
            there = identity(local_path(unit))
            if not is_good():
                discard(local_path(unit), there)

    # ---------------------------------------------------------------- writing

    def create_entry(self, entry: str, recipe: FeatureRecipe) -> None:
        """Make the entry, or check that it was made by the same recipe.

        Raises:
            RecipeMismatchError: it was not; the message names the fields.
            StoreError: the name is not ``[a-z0-9._-]`` with an optional ``@view-k`` or ``@context-mpp``.
        """
        self._check_writable()
        if not ENTRY_NAME.fullmatch(entry):
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
        self._make_way(final, lambda: self._age(self._below(final)) is not None)
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
        return Draft.open(local_path(self.feature_path(slide_id, entry)), subject, recipe.dim, recipe.dtype)

    def clear_draft(self, slide_id: str, entry: str) -> None:
        """Remove what a killed run left beside embeddings that are complete."""
        self._check_writable()
        clear_draft(local_path(self.feature_path(slide_id, entry)))

    def is_claimed(self, slide_id: str, entry: str) -> bool:
        """Whether another process is at work on a slide's embeddings."""
        return is_claimed(local_path(self.feature_path(slide_id, entry)))

    def write_index(self, anew: bool = False) -> None:
        """Write ``index.json``, by which the store is listed faster; see `extract.store.core.index`.

        Where it cannot be written, nothing is lost but time.

        Args:
            anew: from the records alone, whatever the index says now.
        """
        self._check_writable()
        if anew:
            self._index.clear()
        units = [self._below(unit) for entry in (None, *self.entries()) for unit in self.unit_paths(entry).values()]
        # a unit that may not be read is for others to tell
        with suppress(OSError):
            self._index.write([unit for unit in units if self._line(unit) is not None])

    def start_run(self) -> RunLog:
        """Open a new log of this run under ``runs/``."""
        self._check_writable()
        return RunLog(self.path / "runs")

    # ---------------------------------------------------------------- within

    def _below(self, unit: StorePath) -> str:
        """The path of a unit below the store; the parts of ``.`` are none."""
        return "/".join(unit.parts[len(self.path.parts) :])

    @classmethod
    def _root_record(cls, recipe: TileRecipe) -> dict[str, Any]:
        return {"format": FORMAT, "tile_recipe": to_dict(recipe), "fingerprint": fingerprint(recipe)}

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


def _check_written(array: np.ndarray, checksum: str, slide_id: str) -> None:
    if not has_checksum(array, checksum):
        raise UnitCorruptError(f"got other bytes back than were written for slide {slide_id!r} → check the disk")
