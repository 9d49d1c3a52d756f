"""The Zarr v3 store: one raw chunk per matrix, so that the chunk file *is* the matrix and is memory-mapped.

Layout (any Zarr v3 reader opens it):

    cohort.zarr/zarr.json                               attributes.tessera: format, tile recipe, fingerprint
    cohort.zarr/tiles/<slide>/{coords,tissue_fraction,thumbnail,tissue_mask}
    cohort.zarr/features/<entry>/<slide>                one uncompressed chunk
    cohort.zarr/runs/<started>-<host>-<pid>.jsonl
"""

import json
import os
import re
import socket
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from extract.errors import RecipeMismatchError, StoreError, UnitCorruptError
from extract.store.base import FORMAT, SlideReader, Store, TilesUnit, decode_id, encode_id
from extract.store.draft import Draft, clear_draft, is_claimed
from extract.store.files import clear_when_full, commit, discard, members, replace_json, write_json
from extract.store.fingerprint import (
    Execution,
    FeatureRecipe,
    TileRecipe,
    difference,
    fingerprint,
    from_dict,
    sha256_of,
    to_dict,
)
from extract.store.nodes import check_equal, group_metadata, map_array, read_record, write_array

_ENTRY_NAME = re.compile(r"(?!zarr\.json$)[a-z0-9][a-z0-9._-]*(@(view-[0-9]+|context-[0-9.]+))?")


class ZarrSlide(SlideReader):
    """One slide of a `ZarrStore`."""

    def __init__(self, store: "ZarrStore", slide_id: str) -> None:
        self._store = store
        self.slide_id = slide_id
        self._tiles = store.path / "tiles" / encode_id(slide_id)

    @cached_property
    def record(self) -> Mapping[str, Any]:
        """The tiles unit's record."""
        return read_record(self._tiles)

    @property
    def tissue_fraction(self) -> np.ndarray:
        """float32 [n_tiles]."""
        return map_array(self._tiles / "tissue_fraction")

    @property
    def thumbnail(self) -> np.ndarray:
        """uint8 [h, w, 3]."""
        import zarr

        return np.asarray(zarr.open_array(self._tiles / "thumbnail", mode="r")[:])

    @property
    def tissue_mask(self) -> np.ndarray:
        """bool [h, w] on the thumbnail."""
        import zarr

        if not (self._tiles / "tissue_mask" / "zarr.json").is_file():
            return super().tissue_mask
        return np.asarray(zarr.open_array(self._tiles / "tissue_mask", mode="r")[:], dtype=bool)

    def feature_record(self, entry: str) -> Mapping[str, Any]:
        """The features unit's commit record."""
        unit = self.feature_path(entry)
        record = read_record(unit)
        if record["tiles_sha256"] != fingerprint(self.record):
            raise UnitCorruptError(
                f"got features {entry!r} of slide {self.slide_id!r} made from other tiles → the tiles were cut again "
                f"since → run mil extract again; it makes these features anew"
            )
        return record

    def feature_path(self, entry: str) -> Path:
        """Where the features unit lies."""
        unit = self._store.path / "features" / entry / encode_id(self.slide_id)
        if not (unit / "zarr.json").is_file():
            self._store.feature_recipe(entry)
            raise self._store._no_entry(entry, self.slide_id)
        return unit

    def _all_coords(self) -> np.ndarray:
        return map_array(self._tiles / "coords")

    def _all_features(self, entry: str) -> np.ndarray:
        return map_array(self.feature_path(entry))


class ZarrStore(Store):
    """A store in a folder of Zarr v3 arrays.

    Open one with `extract.store.open_store`, make one with `ZarrStore.create`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        attributes = read_record(path)
        if attributes.get("format") != FORMAT:
            raise StoreError(
                f"got store format {attributes.get('format')!r} in {path} → this version reads format {FORMAT} → "
                f"use the version that wrote it"
            )
        self.tile_recipe = from_dict(TileRecipe, attributes["tile_recipe"])
        if attributes["fingerprint"] != fingerprint(self.tile_recipe):
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
        if (path / "zarr.json").is_file():
            store = cls(path)
            changes = difference(store.tile_recipe, recipe)
            if changes and not members(path / "tiles"):
                # nothing was cut yet, as when every slide was refused: the first slide decides
                replace_json(path / "zarr.json", group_metadata(_root_record(recipe)))
                return cls.create(path, recipe)
            if changes:
                raise RecipeMismatchError(
                    f"got a tile recipe unlike that of store {path} (there → now): {'; '.join(changes)} → one store "
                    f"holds one recipe → repeat the settings of the store, or choose another --store"
                )
            store._add_groups()
            return store
        strange = path.exists() and (not path.is_dir() or any(not name.startswith("~") for name in os.listdir(path)))
        # another worker may just have made it
        if strange and not (path / "zarr.json").is_file():
            raise StoreError(f"got {path} as store → it exists and is not a store → choose another --store")
        with clear_when_full(path):
            _make_folder(path)
            replace_json(path / "zarr.json", group_metadata(_root_record(recipe)))
        # whoever made it at the same moment, with whatever recipe: from here on it is like any other store
        return cls.create(path, recipe)

    def _add_groups(self) -> None:
        """Make the two groups; whoever is killed before leaves this to the next."""
        with clear_when_full(self.path):
            for name in ("tiles", "features"):
                (self.path / name).mkdir(exist_ok=True)
                if not (self.path / name / "zarr.json").is_file():
                    replace_json(self.path / name / "zarr.json", group_metadata({}))

    def entries(self) -> list[str]:
        """Names of the features entries."""
        return [
            name for name in members(self.path / "features") if (self.path / "features" / name / "zarr.json").is_file()
        ]

    def feature_recipe(self, entry: str) -> FeatureRecipe:
        """The recipe of an entry."""
        if not _ENTRY_NAME.fullmatch(entry) or not (self.path / "features" / entry / "zarr.json").is_file():
            raise self._no_entry(entry)
        return from_dict(FeatureRecipe, read_record(self.path / "features" / entry)["feature_recipe"])

    def slide_ids(self, entry: str | None = None) -> list[str]:
        """Sorted ids of the slides with complete tiles, or with complete features in ``entry``."""
        if entry is not None:
            self.feature_recipe(entry)
        folder = self.path / "tiles" if entry is None else self.path / "features" / entry
        complete = [name for name in members(folder) if (folder / name / "zarr.json").is_file()]
        ids = sorted(decode_id(name) or read_record(folder / name)["slide_id"] for name in complete)
        return ids if entry is None else [slide_id for slide_id in ids if self.has_features(slide_id, entry)]

    def __contains__(self, slide_id: object) -> bool:
        return isinstance(slide_id, str) and (self.path / "tiles" / encode_id(slide_id) / "zarr.json").is_file()

    def __getitem__(self, slide_id: str) -> ZarrSlide:
        if slide_id not in self:
            raise self._no_slide(slide_id)
        return ZarrSlide(self, slide_id)

    def n_tiles(self, slide_id: str, entry: str) -> int:
        """Rows that ``features(entry)`` of the slide will have, without reading them."""
        record = self[slide_id].feature_record(entry)
        return int(record["n_tiles"]) - len(record["invalid_rows"])

    def has_features(self, slide_id: str, entry: str) -> bool:
        """Whether the slide has complete features in ``entry`` that were made from its present tiles."""
        if slide_id not in self or not (self.path / "features" / entry / encode_id(slide_id) / "zarr.json").is_file():
            return False
        try:
            self[slide_id].feature_record(entry)
        except UnitCorruptError:
            return False
        return True

    def create_entry(self, entry: str, recipe: FeatureRecipe) -> None:
        """Make the entry, or check that it was made by the same recipe.

        Raises:
            RecipeMismatchError: it was not; the message names the fields.
            StoreError: the name is not ``[a-z0-9._-]`` with an optional ``@view-k`` or ``@context-mpp``.
        """
        if not _ENTRY_NAME.fullmatch(entry):
            raise StoreError(
                f"got entry name {entry!r} → small letters, digits and . _ - are allowed → choose another --as"
            )
        folder = self.path / "features" / entry
        if not (folder / "zarr.json").is_file():
            with clear_when_full(folder):
                folder.mkdir(parents=True, exist_ok=True)
                record = {"feature_recipe": to_dict(recipe), "fingerprint": fingerprint(recipe)}
                replace_json(folder / "zarr.json", group_metadata(record))
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
        arrays = {
            "coords": np.ascontiguousarray(unit.coords, dtype=np.int32),
            "tissue_fraction": np.ascontiguousarray(unit.tissue_fraction, dtype=np.float32),
        }
        pictures = {"thumbnail": np.ascontiguousarray(unit.thumbnail, dtype=np.uint8)}
        if unit.tissue_mask is not None:
            pictures["tissue_mask"] = np.ascontiguousarray(unit.tissue_mask, dtype=np.uint8)
        checksums = {name: sha256_of(array) for name, array in (arrays | pictures).items()}
        record = {**unit.record, "slide_id": unit.slide_id, "n_tiles": len(unit.coords), "sha256": checksums}

        def build(partial: Path) -> None:
            for name, array in arrays.items():
                write_array(partial / name, array)
                check_equal(map_array(partial / name), checksums[name], unit.slide_id)
            for name, picture in pictures.items():
                _write_picture(partial / name, picture)
            write_json(partial / "zarr.json", group_metadata(record))

        needed = sum(array.nbytes for array in (arrays | pictures).values())
        commit(self.path / "tiles" / encode_id(unit.slide_id), build, needed)

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
        recipe, tiles = self.feature_recipe(entry), self[slide_id].record
        expected = ((tiles["n_tiles"], recipe.dim), recipe.dtype)
        if (features.shape, features.dtype.name) != expected:
            raise StoreError(
                f"got features {features.shape} {features.dtype} of slide {slide_id!r} → expected {expected}"
            )
        matrix = np.ascontiguousarray(features)
        checksum = sha256_of(matrix)
        record = {
            "slide_id": slide_id,
            "n_tiles": len(matrix),
            "sha256": checksum,
            "tiles_sha256": fingerprint(tiles),
            "invalid_rows": sorted(invalid_rows),
            "flagged_rows": dict(flagged_rows or {}),
            "execution": to_dict(execution),
            "execution_fingerprint": fingerprint(execution),
        }

        def build(partial: Path) -> None:
            write_array(partial, matrix, record)
            written = map_array(partial)
            check_equal(written, checksum, slide_id)
            if not np.isfinite(written).all():
                raise StoreError(f"got features of slide {slide_id!r} that are not finite → they are not stored")

        final = self.path / "features" / entry / encode_id(slide_id)
        if final.exists() and not self.has_features(slide_id, entry):
            discard(final)
        commit(final, build, matrix.nbytes)

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
        recipe = self.feature_recipe(entry)
        subject = {
            "features": fingerprint(recipe),
            "tiles": fingerprint(self[slide_id].record),
            "execution": fingerprint(execution),
        }
        return Draft.open(self.path / "features" / entry / encode_id(slide_id), subject, recipe.dim, recipe.dtype)

    def clear_draft(self, slide_id: str, entry: str) -> None:
        """Remove what a killed run left beside embeddings that are complete."""
        clear_draft(self.path / "features" / entry / encode_id(slide_id))

    def is_claimed(self, slide_id: str, entry: str) -> bool:
        """Whether another process is at work on a slide's embeddings."""
        return is_claimed(self.path / "features" / entry / encode_id(slide_id))

    def start_run(self) -> "RunLog":
        """Open a new log of this run under ``runs/``."""
        return RunLog(self.path / "runs")


class RunLog:
    """One JSON line per slide of one run: outcome, reason, timings."""

    def __init__(self, folder: Path) -> None:
        started = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())
        with clear_when_full(folder):
            folder.mkdir(exist_ok=True)
        self.path = folder / f"{started}-{host}-{os.getpid()}.jsonl"

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line and push it to the file."""
        with clear_when_full(self.path), open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (NotADirectoryError, FileExistsError, PermissionError) as error:
        raise StoreError(
            f"got {path} as store → it cannot be made ({error.strerror}) → choose another --store"
        ) from error


def _root_record(recipe: TileRecipe) -> dict[str, Any]:
    return {"format": FORMAT, "tile_recipe": to_dict(recipe), "fingerprint": fingerprint(recipe)}


def _write_picture(folder: Path, picture: np.ndarray) -> None:
    """Write the thumbnail or its mask compressed: they are looked at, not trained on."""
    import zarr

    zarr.create_array(folder, data=picture, chunks=picture.shape, compressors=zarr.codecs.ZstdCodec(level=3))
