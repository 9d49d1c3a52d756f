"""One slide of a store, read and checked."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from extract.errors import EntryNotFoundError, StoreError, UnitCorruptError
from extract.store.core.fingerprint import fingerprint
from extract.store.core.recipes import FeatureRecipe
from extract.store.core.remote_path import StorePath
from extract.store.core.rows import Rows, row_index
from extract.store.core.unit import Form, array_form, has_checksum

_TILES_KEYS = ("slide_id", "n_tiles", "sha256")
_FEATURES_KEYS = ("slide_id", "n_tiles", "sha256", "tiles_sha256", "invalid_rows")


class Units(Protocol):
    """What a reader asks of its store."""

    path: StorePath

    def tiles_path(self, slide_id: str) -> StorePath:
        """Where the slide's tiles unit lies."""
        ...

    def feature_path(self, slide_id: str, entry: str) -> StorePath:
        """Where its features unit lies."""
        ...

    def entries(self) -> list[str]:
        """Names of the store's entries."""
        ...

    def has_features(self, slide_id: str, entry: str) -> bool:
        """Whether the slide's features are complete."""
        ...

    def feature_recipe(self, entry: str) -> FeatureRecipe:
        """How an entry was embedded."""
        ...

    def _form_of(self, entry: str) -> tuple[int, str]: ...
    def _is_complete(self, unit: StorePath) -> bool: ...
    def _no_entry(self, entry: str, slide_id: str | None = None) -> EntryNotFoundError: ...
    def _read_record(self, unit: StorePath) -> dict[str, Any]: ...
    def _read_array(self, unit: StorePath, name: str, rows: slice | np.ndarray | None = None) -> np.ndarray: ...
    def _verify_extras(self, slide: "SlideReader", entry: str) -> None: ...


class SlideReader:
    """One slide of a store. Arrays are read-only views of the file where it can be mapped.

    Example:
        >>> slide = open_store("cohort.zarr")["site A/slide 1"]            # doctest: +SKIP
        >>> slide.features("efficientnet_lite0", rows=slice(100)).shape    # doctest: +SKIP
        (100, 1280)
    """

    def __init__(self, store: Units, slide_id: str) -> None:
        self.slide_id = slide_id
        self._store = store
        self._tiles = store.tiles_path(slide_id)

    @cached_property
    def record(self) -> Mapping[str, Any]:
        """The tiles unit's record: mpp and its source, sizes, frames, fingerprints."""
        return self._checked(self._tiles, _TILES_KEYS)

    @property
    def n_tiles(self) -> int:
        """Tiles of the slide, those that could not be decoded included."""
        return int(self.record["n_tiles"])

    @property
    def tissue_fraction(self) -> np.ndarray:
        """float32 [n_tiles], part of each tile's area that is tissue; StoreError where an import had none."""
        return self.array("tissue_fraction")

    @property
    def thumbnail(self) -> np.ndarray:
        """uint8 [h, w, 3]; ``record["thumbnail"]`` holds its frame. StoreError where an import had none."""
        return self.array("thumbnail")

    @property
    def tissue_mask(self) -> np.ndarray:
        """bool [h, w] on the thumbnail: what was taken for tissue.

        Raises:
            StoreError: the unit holds none, as imported ones and those of earlier versions.
        """
        return self.array("tissue_mask").astype(bool)

    def array(self, name: str) -> np.ndarray:
        """An array of the tiles unit as it is stored: ``coords``, ``tissue_fraction``, ``thumbnail``, ``tissue_mask``.

        Raises:
            StoreError: the unit holds none, as imported ones may.
            UnitCorruptError: it is damaged, or of another shape or dtype than it must be.
        """
        if name not in self.record["sha256"]:
            lost = ": nothing can be placed on the slide (no heatmap)" if name == "coords" else ""
            raise StoreError(
                f"got no {name.replace('_', ' ')} for slide {self.slide_id!r} → imported slides, and those cut by "
                f"earlier versions, may have none{lost} → extract the slide into a new store to get it"
            )
        array = self._store._read_array(self._tiles, name)
        self._check_form(name, array, array_form(name, array, self.n_tiles), self._tiles)
        return array

    def matrix(self, entry: str) -> np.ndarray:
        """Embeddings [n_tiles, dim] as they are stored: rows of tiles that could not be decoded are zero."""
        return self._all_features(entry)

    def entries(self) -> list[str]:
        """Names of the entries in which the slide has complete features."""
        return [entry for entry in self._store.entries() if self._store.has_features(self.slide_id, entry)]

    def feature_path(self, entry: str) -> StorePath:
        """Where the features unit lies.

        Raises:
            EntryNotFoundError: the slide has no features in this entry.
        """
        unit = self._store.feature_path(self.slide_id, entry)
        if not self._store._is_complete(unit):
            self._store.feature_recipe(entry)
            raise self._store._no_entry(entry, self.slide_id)
        return unit

    def feature_record(self, entry: str) -> Mapping[str, Any]:
        """The features unit's commit record: checksum, invalid rows, execution.

        Raises:
            EntryNotFoundError: the slide has no features in this entry.
            UnitCorruptError: the record is damaged, or the features are of other tiles than the slide has now.
        """
        record = self._checked(self.feature_path(entry), _FEATURES_KEYS)
        if record["tiles_sha256"] != fingerprint(self.record):
            raise UnitCorruptError(
                f"got features {entry!r} of slide {self.slide_id!r} made from other tiles → the tiles were cut again "
                f"since → run mil extract again; it makes these features anew"
            )
        return record

    def valid(self, entry: str) -> np.ndarray:
        """bool [n_tiles]: False for tiles that could not be decoded."""
        return self._valid(self.feature_record(entry))

    def features(self, entry: str, rows: Rows | None = None) -> np.ndarray:
        """Embeddings [n_valid, dim] of the tiles that could be decoded; a view of the file when that is all of them.

        Args:
            entry: name of a features entry.
            rows: a slice, row numbers, or bool [n_valid]: only these rows are read. None for all.

        Raises:
            EntryNotFoundError: the slide has no complete features in this entry.
            StoreError: a row that is not there.
        """
        record = self.feature_record(entry)
        return self._all_features(entry, self._choose(record, entry, rows))

    def coords(self, entry: str | None = None, rows: Rows | None = None) -> np.ndarray:
        """Tile corners int32 [n, 2] in level-0 px; with ``entry``, row for row those of ``features(entry, rows)``.

        Raises:
            StoreError: the slide was imported without coordinates.
        """
        if entry is None:
            coords = self._all_coords()
            return coords if rows is None else coords[row_index(rows, len(coords), f"slide {self.slide_id!r}")]
        chosen = self._choose(self.feature_record(entry), entry, rows)
        coords = self._all_coords()
        return coords if chosen is None else coords[chosen]

    def verify_features(self, entry: str) -> None:
        """Compare the features with the checksum of their record; reads them once.

        Raises:
            UnitCorruptError: they are not the bytes that were written.
        """
        record = self.feature_record(entry)
        if not has_checksum(self._all_features(entry), record["sha256"]):
            raise self._damaged(f"features {entry!r}", self.feature_path(entry))
        self._store._verify_extras(self, entry)

    def verify_tiles(self) -> None:
        """Compare every array of the tiles unit with its checksum; reads them once.

        Raises:
            UnitCorruptError: one is not the bytes that were written; the message names it.
        """
        for name, checksum in self.record["sha256"].items():
            if not has_checksum(self.array(name), checksum):
                raise self._damaged(name, self._tiles)

    def __repr__(self) -> str:
        record = self.record
        lines = [f"<slide {self.slide_id!r} of {self._store.path}: {self.n_tiles} tiles {_scale_of(record)}>"]
        for entry in self.entries():
            recipe, invalid = self._store.feature_recipe(entry), len(self.feature_record(entry)["invalid_rows"])
            left_out = f" ({invalid} tiles could not be decoded)" if invalid else ""
            lines.append(f"  {entry}: {recipe.dtype} [{self.n_tiles - invalid}, {recipe.dim}]{left_out}")
        return "\n".join(lines)

    def _all_coords(self) -> np.ndarray:
        """int32 [n_tiles, 2], invalid rows included."""
        return self.array("coords")

    def _all_features(self, entry: str, rows: slice | np.ndarray | None = None) -> np.ndarray:
        """[n_tiles, dim], invalid rows included, or some of its rows.

        Raises:
            UnitCorruptError: the matrix is of another shape or dtype than record and recipe say.
        """
        unit, (dim, dtype) = self.feature_path(entry), self._store._form_of(entry)
        try:
            array = self._store._read_array(unit, "features", rows)
        except IndexError:
            # fewer rows than tiles
            array = self._store._read_array(unit, "features")
        n = self.n_tiles if rows is None else len(np.arange(self.n_tiles)[rows])
        self._check_form(f"features {entry!r}", array, ((n, dim), dtype), unit)
        return array

    def _check_form(self, what: str, array: np.ndarray, form: Form, unit: StorePath) -> None:
        if (array.shape, array.dtype.name) != form:
            raise UnitCorruptError(
                f"got {what} of slide {self.slide_id!r} as {array.dtype} {list(array.shape)} → expected {form[1]} "
                f"{list(form[0])} → the file was changed after it was written → delete {unit} and run mil extract again"
            )

    def _valid(self, record: Mapping[str, Any]) -> np.ndarray:
        valid = np.ones(int(record["n_tiles"]), dtype=bool)
        try:
            valid[list(record["invalid_rows"])] = False
        except (IndexError, TypeError) as error:
            raise UnitCorruptError(
                f"got invalid rows of slide {self.slide_id!r} that it does not have ({error}) → its record is damaged "
                f"→ run mil store repair, then mil extract again"
            ) from error
        return valid

    def _choose(self, record: Mapping[str, Any], entry: str, rows: Rows | None) -> slice | np.ndarray | None:
        """The stored rows that were asked for, by their place among the valid ones; None for all of them."""
        kept = np.flatnonzero(self._valid(record)) if record["invalid_rows"] else None
        if rows is None:
            return kept
        n = int(record["n_tiles"]) if kept is None else len(kept)
        index = row_index(rows, n, f"features {entry!r} of slide {self.slide_id!r}")
        return index if kept is None else kept[index]

    def _checked(self, unit: StorePath, keys: Sequence[str]) -> dict[str, Any]:
        """The record of a unit of this slide, with at least these keys."""
        record = self._store._read_record(unit)
        if absent := [key for key in keys if key not in record]:
            raise UnitCorruptError(
                f"got a record without {absent} in {unit} → it is damaged → run mil store repair, then mil extract "
                f"again"
            )
        if record["slide_id"] != self.slide_id:
            raise UnitCorruptError(
                f"got the unit of slide {record['slide_id']!r} in {unit} → expected that of {self.slide_id!r} → it was "
                f"renamed or copied by hand; delete it and run mil extract again"
            )
        return record

    def _damaged(self, what: str, unit: StorePath) -> UnitCorruptError:
        return UnitCorruptError(
            f"got {what} of slide {self.slide_id!r} that do not match their checksum → the file was damaged or changed "
            f"after it was written → delete {unit} and run mil extract again"
        )


def _scale_of(record: Mapping[str, Any]) -> str:
    """Size and scale of a slide's tiles as far as its record tells, for people."""
    mpp = record.get("mpp")
    achieved, native = (mpp.get("achieved"), mpp.get("native")) if isinstance(mpp, Mapping) else (None, None)
    size = f"of {record['tile_px']} px " if "tile_px" in record else ""
    scale = "at an unknown scale" if achieved is None else f"at {achieved:g} µm/px"
    return f"{size}{scale}" + ("" if native is None else f" (level 0: {native:g})")
