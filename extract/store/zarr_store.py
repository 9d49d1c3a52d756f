"""The Zarr v3 store: one raw chunk per matrix, so that the chunk file *is* the matrix and is memory-mapped.

Layout (any Zarr v3 reader opens it):

    cohort.zarr/zarr.json                               attributes.tessera: format, tile recipe, fingerprint
    cohort.zarr/tiles/<slide>/{coords,tissue_fraction,thumbnail}
    cohort.zarr/features/<entry>/<slide>                one uncompressed chunk
    cohort.zarr/runs/<started>-<host>-<pid>.jsonl
"""

import errno
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from extract.errors import RecipeMismatchError, StoreError, StoreFullError, UnitCorruptError
from extract.store.base import FORMAT, SlideReader, Store, TilesUnit, decode_id, encode_id
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

_ENTRY_NAME = re.compile(r"(?!zarr\.json$)[a-z0-9][a-z0-9._-]*(@view-[0-9]+)?")
_ZARR_TYPES = {"float16": "<f2", "float32": "<f4", "int32": "<i4"}


class ZarrSlide(SlideReader):
    """One slide of a `ZarrStore`."""

    def __init__(self, store: "ZarrStore", slide_id: str) -> None:
        self._store = store
        self.slide_id = slide_id
        self._tiles = store.path / "tiles" / encode_id(slide_id)

    @cached_property
    def record(self) -> Mapping[str, Any]:
        """The tiles unit's record."""
        return _record(self._tiles)

    @property
    def tissue_fraction(self) -> np.ndarray:
        """float32 [n_tiles]."""
        return _map_array(self._tiles / "tissue_fraction")

    @property
    def thumbnail(self) -> np.ndarray:
        """uint8 [h, w, 3]."""
        import zarr

        return np.asarray(zarr.open_array(self._tiles / "thumbnail", mode="r")[:])

    def feature_record(self, entry: str) -> Mapping[str, Any]:
        """The features unit's commit record."""
        unit = self.feature_path(entry)
        record = _record(unit)
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
        return _map_array(self._tiles / "coords")

    def _all_features(self, entry: str) -> np.ndarray:
        return _map_array(self.feature_path(entry))


class ZarrStore(Store):
    """A store in a folder of Zarr v3 arrays.

    Open one with `extract.store.open_store`, make one with `ZarrStore.create`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        attributes = _record(path)
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
            if changes and not _members(path / "tiles"):
                # nothing was cut yet, as when every slide was refused: the first slide decides
                _replace_json(path / "zarr.json", _group(_root_record(recipe)))
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
        with _clear_when_full(path):
            _make_folder(path)
            _replace_json(path / "zarr.json", _group(_root_record(recipe)))
        # whoever made it at the same moment, with whatever recipe: from here on it is like any other store
        return cls.create(path, recipe)

    def _add_groups(self) -> None:
        """Make the two groups; whoever is killed before leaves this to the next."""
        with _clear_when_full(self.path):
            for name in ("tiles", "features"):
                (self.path / name).mkdir(exist_ok=True)
                if not (self.path / name / "zarr.json").is_file():
                    _replace_json(self.path / name / "zarr.json", _group({}))

    def entries(self) -> list[str]:
        """Names of the features entries."""
        return [
            name for name in _members(self.path / "features") if (self.path / "features" / name / "zarr.json").is_file()
        ]

    def feature_recipe(self, entry: str) -> FeatureRecipe:
        """The recipe of an entry."""
        if not _ENTRY_NAME.fullmatch(entry) or not (self.path / "features" / entry / "zarr.json").is_file():
            raise self._no_entry(entry)
        return from_dict(FeatureRecipe, _record(self.path / "features" / entry)["feature_recipe"])

    def slide_ids(self, entry: str | None = None) -> list[str]:
        """Sorted ids of the slides with complete tiles, or with complete features in ``entry``."""
        if entry is not None:
            self.feature_recipe(entry)
        folder = self.path / "tiles" if entry is None else self.path / "features" / entry
        complete = [name for name in _members(folder) if (folder / name / "zarr.json").is_file()]
        ids = sorted(decode_id(name) or _record(folder / name)["slide_id"] for name in complete)
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
            StoreError: the name is not ``[a-z0-9._-]`` with an optional ``@view-k``.
        """
        if not _ENTRY_NAME.fullmatch(entry):
            raise StoreError(
                f"got entry name {entry!r} → small letters, digits and . _ - are allowed → choose another --as"
            )
        folder = self.path / "features" / entry
        if not (folder / "zarr.json").is_file():
            with _clear_when_full(folder):
                folder.mkdir(parents=True, exist_ok=True)
                record = {"feature_recipe": to_dict(recipe), "fingerprint": fingerprint(recipe)}
                _replace_json(folder / "zarr.json", _group(record))
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
        thumbnail = np.ascontiguousarray(unit.thumbnail, dtype=np.uint8)
        checksums = {name: sha256_of(array) for name, array in arrays.items()} | {"thumbnail": sha256_of(thumbnail)}
        record = {**unit.record, "slide_id": unit.slide_id, "n_tiles": len(unit.coords), "sha256": checksums}

        def build(partial: Path) -> None:
            for name, array in arrays.items():
                _write_array(partial / name, array)
                _check_equal(_map_array(partial / name), checksums[name], unit.slide_id)
            _write_thumbnail(partial / "thumbnail", thumbnail)
            _write_json(partial / "zarr.json", _group(record))

        needed = thumbnail.nbytes + sum(array.nbytes for array in arrays.values())
        _commit(self.path / "tiles" / encode_id(unit.slide_id), build, needed)

    def write_features(
        self,
        entry: str,
        slide_id: str,
        features: np.ndarray,
        invalid_rows: list[int],
        execution: Execution,
    ) -> None:
        """Commit a slide's embeddings. A unit of the same tiles that is already there stays as it is.

        Args:
            entry: name of an entry made by `create_entry`.
            slide_id: a slide whose tiles are committed.
            features: [n_tiles, dim] in the entry's dtype, finite, invalid rows zero.
            invalid_rows: rows whose tile could not be decoded.
            execution: how they were computed.

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
            "execution": to_dict(execution),
            "execution_fingerprint": fingerprint(execution),
        }

        def build(partial: Path) -> None:
            _write_array(partial, matrix, record)
            written = _map_array(partial)
            _check_equal(written, checksum, slide_id)
            if not np.isfinite(written).all():
                raise StoreError(f"got features of slide {slide_id!r} that are not finite → they are not stored")

        final = self.path / "features" / entry / encode_id(slide_id)
        if final.exists() and not self.has_features(slide_id, entry):
            _discard(final)
        _commit(final, build, matrix.nbytes)

    def start_run(self) -> "RunLog":
        """Open a new log of this run under ``runs/``."""
        return RunLog(self.path / "runs")


class RunLog:
    """One JSON line per slide of one run: outcome, reason, timings."""

    def __init__(self, folder: Path) -> None:
        started = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())
        with _clear_when_full(folder):
            folder.mkdir(exist_ok=True)
        self.path = folder / f"{started}-{host}-{os.getpid()}.jsonl"

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line and push it to the file."""
        with _clear_when_full(self.path), open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _group(record: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of a Zarr v3 group with our attributes."""
    return {"zarr_format": 3, "node_type": "group", "attributes": {"tessera": dict(record)}}


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (NotADirectoryError, FileExistsError, PermissionError) as error:
        raise StoreError(
            f"got {path} as store → it cannot be made ({error.strerror}) → choose another --store"
        ) from error


def _root_record(recipe: TileRecipe) -> dict[str, Any]:
    return {"format": FORMAT, "tile_recipe": to_dict(recipe), "fingerprint": fingerprint(recipe)}


def _raw_layout(shape: tuple[int, ...], data_type: str) -> dict[str, Any]:
    """How an array lies on disk: one uncompressed little-endian chunk in the file ``c/0/...``."""
    return {
        "data_type": data_type,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
    }


def _array_metadata(array: np.ndarray, record: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of a Zarr v3 array of one raw chunk, with our attributes."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(array.shape),
        **_raw_layout(array.shape, array.dtype.name),
        "fill_value": 0,
        "attributes": {"tessera": dict(record)},
    }


def _record(node: Path) -> dict[str, Any]:
    """Our attributes of a Zarr node."""
    try:
        with open(node / "zarr.json", encoding="utf-8") as file:
            record: dict[str, Any] = json.load(file)["attributes"]["tessera"]
            return record
    except FileNotFoundError as error:
        raise StoreError(f"got {node} → there is no zarr.json: not a store, or an incomplete unit") from error
    except (ValueError, LookupError, TypeError) as error:
        raise UnitCorruptError(
            f"got {node / 'zarr.json'} → it is damaged or not ours ({error!r}) → extract again"
        ) from error


def _map_array(folder: Path) -> np.ndarray:
    """Map the array's single raw chunk; fall back to zarr-python when it is stored in any other way."""
    try:
        metadata = json.loads((folder / "zarr.json").read_bytes())
        shape = tuple(int(n) for n in metadata["shape"])
        layout = {key: metadata[key] for key in ("data_type", "chunk_grid", "chunk_key_encoding", "codecs")}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UnitCorruptError(
            f"got {folder / 'zarr.json'} → unreadable ({error}) → extract the slide again"
        ) from error
    if layout["data_type"] not in _ZARR_TYPES or layout != _raw_layout(shape, layout["data_type"]):
        import zarr

        return np.asarray(zarr.open_array(folder, mode="r")[:])
    dtype = np.dtype(_ZARR_TYPES[layout["data_type"]])
    chunk = folder / "/".join(["c", *("0" for _ in shape)])
    expected = int(np.prod(shape)) * dtype.itemsize
    size = chunk.stat().st_size if chunk.is_file() else -1
    if size != expected:
        raise UnitCorruptError(
            f"got {max(size, 0)} bytes in {chunk} → its record says {expected} → the file is damaged; "
            f"delete the folder "
            f"{folder} and run mil extract again"
        )
    return np.memmap(chunk, dtype=dtype, mode="r", shape=shape).view(np.ndarray)


def _write_array(folder: Path, array: np.ndarray, record: Mapping[str, Any] | None = None) -> None:
    """Write an array as one raw chunk, the metadata last."""
    chunk = folder / "/".join(["c", *("0" for _ in array.shape)])
    chunk.parent.mkdir(parents=True)
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    # not ndarray.tofile: its error on a full disk has no errno
    with open(chunk, "wb") as file:
        file.write(little.data.cast("B"))
    _write_json(folder / "zarr.json", _array_metadata(array, record or {}))


def _write_thumbnail(folder: Path, thumbnail: np.ndarray) -> None:
    """Write the thumbnail compressed: it is looked at, not trained on."""
    import zarr

    zarr.create_array(folder, data=thumbnail, chunks=thumbnail.shape, compressors=zarr.codecs.ZstdCodec(level=3))


def _check_equal(array: np.ndarray, checksum: str, slide_id: str) -> None:
    if sha256_of(array) != checksum:
        raise UnitCorruptError(f"got other bytes back than were written for slide {slide_id!r} → check the disk")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _replace_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file so that a reader sees the old one or the new one, never a part."""
    partial = _partial(path)
    try:
        _write_json(partial, value)
        _sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _commit(final: Path, build: Callable[[Path], None], needed_bytes: int) -> None:
    """Build a unit beside its final path and rename it into place; whoever comes second changes nothing."""
    if final.exists():
        return
    partial = _partial(final)
    try:
        with _clear_when_full(final, needed_bytes):
            partial.mkdir(parents=True)
            build(partial)
            for folder, _, files in os.walk(partial, topdown=False):
                for name in files:
                    _sync(Path(folder, name))
                _sync(Path(folder))
            try:
                os.rename(partial, final)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            _sync(final.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _discard(unit: Path) -> None:
    """Take a unit out of the store in one step, then delete it."""
    aside = _partial(unit)
    # another writer may have been first
    with suppress(FileNotFoundError):
        os.rename(unit, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _partial(final: Path) -> Path:
    """A name beside ``final`` that no slide id is encoded to: encoded ids never begin with ``~``."""
    return final.with_name(f"~{uuid.uuid4().hex}.partial")


def _members(folder: Path) -> list[str]:
    """Sorted names of the folders in ``folder``, without what is still being built; empty if it is absent."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith("~") and entry.is_dir())
    except FileNotFoundError:
        return []


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _clear_when_full:
    """Turn 'no space left' into a message that says how much is needed."""

    def __init__(self, path: Path, needed_bytes: int = 0) -> None:
        self._path, self._needed = path, needed_bytes

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return
        folder = next(parent for parent in (self._path, *self._path.parents) if parent.exists())
        free = shutil.disk_usage(folder).free
        raise StoreFullError(
            f"got no space left while writing {self._path.name} ({free / 1e6:.1f} MB free) → this unit needs about "
            f"{self._needed / 1e6:.1f} MB → free some space or move the store, then run the same command "
            f"again: the store is "
            f"valid and finished slides are kept"
        ) from error
