"""What every store is: a folder of committed units, one pair per slide, and readers that copy nothing.

A *tiles unit* says where a slide was cut; a *features unit* holds one embedding per tile. A unit is complete exactly
when it is at its final path with a commit record inside; anything else does not exist.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

from extract.errors import EntryNotFoundError, SlideNotFoundError, StoreError, UnitCorruptError
from extract.store.fingerprint import FeatureRecipe, TileRecipe, sha256_of

FORMAT = 1
_SAFE_NAME_BYTES = 200


def encode_id(slide_id: str) -> str:
    """The file name of a slide id: percent-encoded, never empty, hidden, reserved, or longer than file systems allow.

    An id whose encoding is longer than 200 bytes keeps its beginning and gets a digest; its record holds the whole id.
    """
    from hashlib import sha256

    name = quote(slide_id, safe="", errors="surrogateescape").replace("~", "%7E")
    if name.startswith((".", "_")) or name == "zarr.json":
        name = f"%{ord(name[0]):02X}{name[1:]}"
    if not name:
        raise StoreError("got an empty slide id → a slide needs a name → give one in the slide table")
    if len(name) > _SAFE_NAME_BYTES:
        name = f"{name[: _SAFE_NAME_BYTES - 40]}~{sha256(slide_id.encode(errors='surrogateescape')).hexdigest()[:32]}"
    return name


def decode_id(name: str) -> str | None:
    """The slide id of a file name, or None when only the unit's record has it."""
    return None if "~" in name else unquote(name, errors="surrogateescape")


@dataclass(frozen=True)
class TilesUnit:
    """Where a slide was cut.

    Attributes:
        slide_id: the slide's id.
        coords: int32 [n_tiles, 2], top-left (x, y) in level-0 px, row-major order.
        tissue_fraction: float32 [n_tiles], part of each tile's area that is tissue.
        thumbnail: uint8 [h, w, 3].
        record: plain JSON values: mpp and its source, sizes, frames, the slide's fingerprint.
        tissue_mask: bool [h, w] on the thumbnail; None where it is not known, as in imported units.
    """

    slide_id: str
    coords: np.ndarray
    tissue_fraction: np.ndarray
    thumbnail: np.ndarray
    record: Mapping[str, Any]
    tissue_mask: np.ndarray | None = None


class SlideReader(ABC):
    """One slide of a store. Arrays are read-only views where the backend can map them."""

    slide_id: str

    @property
    @abstractmethod
    def record(self) -> Mapping[str, Any]:
        """The tiles unit's record: mpp and its source, sizes, frames, fingerprints."""

    @property
    @abstractmethod
    def tissue_fraction(self) -> np.ndarray:
        """float32 [n_tiles]."""

    @property
    @abstractmethod
    def thumbnail(self) -> np.ndarray:
        """uint8 [h, w, 3]; ``record["thumbnail"]`` holds its frame."""

    @property
    def tissue_mask(self) -> np.ndarray:
        """bool [h, w] on the thumbnail: what was taken for tissue.

        Raises:
            StoreError: the unit holds none, as imported ones and those of earlier versions.
        """
        raise StoreError(
            f"got no tissue mask for slide {self.slide_id!r} → imported slides, and those cut by earlier versions, "
            f"have none → extract the slide into a new store to get one"
        )

    @abstractmethod
    def feature_record(self, entry: str) -> Mapping[str, Any]:
        """The features unit's commit record: checksum, invalid rows, execution."""

    @abstractmethod
    def _all_coords(self) -> np.ndarray:
        """int32 [n_tiles, 2], invalid rows included."""

    @abstractmethod
    def _all_features(self, entry: str) -> np.ndarray:
        """[n_tiles, dim], invalid rows included."""

    def valid(self, entry: str) -> np.ndarray:
        """bool [n_tiles]: False for tiles that could not be decoded."""
        valid = np.ones(len(self._all_coords()), dtype=bool)
        valid[list(self.feature_record(entry)["invalid_rows"])] = False
        return valid

    def features(self, entry: str) -> np.ndarray:
        """Embeddings [n_valid, dim] of the tiles that could be decoded; a view of the file when that is all of them.

        Raises:
            EntryNotFoundError: the slide has no complete features in this entry.
        """
        matrix: np.ndarray = self._all_features(entry)
        if self.feature_record(entry)["invalid_rows"]:
            return np.asarray(matrix[self.valid(entry)])
        return matrix

    def verify_features(self, entry: str) -> None:
        """Compare the features with the checksum of their record; reads them once.

        Raises:
            UnitCorruptError: they are not the bytes that were written.
        """
        if sha256_of(np.ascontiguousarray(self._all_features(entry))) != self.feature_record(entry)["sha256"]:
            raise UnitCorruptError(
                f"got features {entry!r} of slide {self.slide_id!r} that do not match their checksum → "
                f"the file was damaged "
                f"or changed after it was written → delete {self.feature_path(entry)} and run mil extract again"
            )

    @abstractmethod
    def feature_path(self, entry: str) -> Path:
        """Where the features unit lies."""

    def coords(self, entry: str | None = None) -> np.ndarray:
        """Tile corners int32 [n, 2] in level-0 px; with ``entry``, row for row those of ``features(entry)``."""
        coords = self._all_coords()
        if entry is None or not self.feature_record(entry)["invalid_rows"]:
            return coords
        return np.asarray(coords[self.valid(entry)])


class Store(ABC):
    """A cohort of slides, cut once, embedded by any number of backbones."""

    path: Path
    tile_recipe: TileRecipe

    @abstractmethod
    def entries(self) -> list[str]:
        """Names of the features entries."""

    @abstractmethod
    def feature_recipe(self, entry: str) -> FeatureRecipe:
        """The recipe of an entry.

        Raises:
            EntryNotFoundError: no such entry; the message lists those there are.
        """

    @abstractmethod
    def slide_ids(self, entry: str | None = None) -> list[str]:
        """Sorted ids of the slides with complete tiles, or with complete features in ``entry``."""

    @abstractmethod
    def __getitem__(self, slide_id: str) -> SlideReader:
        """Open one slide.

        Raises:
            SlideNotFoundError: the store holds no such slide.
        """

    @abstractmethod
    def n_tiles(self, slide_id: str, entry: str) -> int:
        """Rows that ``features(entry)`` of the slide will have, without reading them."""

    def dim(self, entry: str) -> int:
        """Features per tile."""
        return self.feature_recipe(entry).dim

    def __len__(self) -> int:
        return len(self.slide_ids())

    def __iter__(self) -> Iterator[str]:
        return iter(self.slide_ids())

    def __contains__(self, slide_id: object) -> bool:
        return slide_id in self.slide_ids()

    def __repr__(self) -> str:
        counts = ", ".join(f"{entry}: {len(self.slide_ids(entry))}" for entry in self.entries()) or "no features"
        return f"{type(self).__name__}({os.fspath(self.path)!r}, {len(self)} slides; {counts})"

    def _no_entry(self, entry: str, slide_id: str | None = None) -> EntryNotFoundError:
        where = f"slide {slide_id!r} of store {self.path}" if slide_id else f"store {self.path}"
        return EntryNotFoundError(
            f"got entry {entry!r} → {where} holds {self.entries()} → choose one of these, or run mil extract with it"
        )

    def _no_slide(self, slide_id: str) -> SlideNotFoundError:
        from difflib import get_close_matches

        near = get_close_matches(slide_id, self.slide_ids(), n=3)
        hint = f"did you mean {near}?" if near else "list the ids with store.slide_ids()"
        return SlideNotFoundError(f"got slide {slide_id!r} → store {self.path} has no such slide → {hint}")
