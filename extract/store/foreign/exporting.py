"""Exporting: the bags of a store as files that other tools read unchanged."""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from extract.errors import EntryNotFoundError, ExtractError, StoreError, StoreFullError
from extract.store import Store, TileRecipe
from extract.store.core.files import clear_when_full, partial_path
from extract.store.core.unit import encode_id
from extract.store.foreign.importing import OnOutcome, Outcome
from extract.store.foreign.spatialdata import write_spatialdata
from extract.store.formats.tool_attributes import coords_attributes


@dataclass(frozen=True, eq=False)
class Bag:
    """One slide on its way out: rows of tiles that could not be decoded are left out.

    Attributes:
        slide_id: the slide's id.
        entry: the features entry.
        features: [n, dim].
        coords: int32 [n, 2], level-0 corners, or None where the store has none.
        record: of the tiles unit.
        recipe: of the store's tiles.
    """

    slide_id: str
    entry: str
    features: np.ndarray
    coords: np.ndarray | None
    record: Mapping[str, Any]
    recipe: TileRecipe


def export_store(
    store: Store,
    out: str | Path,
    format: str,
    entry: str | None = None,
    overwrite: bool = False,
    progress: OnOutcome | None = None,
) -> list[Outcome]:
    """Write every slide of an entry for another tool. A slide that cannot be written is listed, and the others go on.

    Args:
        store: the store.
        out: folder; must be new or empty, unless ``overwrite``.
        format: ``trident``, ``clam`` or ``spatialdata``.
        entry: the features entry; may be left out where there is one.
        overwrite: replace files that are there.
        progress: called after each slide.

    Raises:
        StoreError: an unknown format, or ``out`` is not empty.
        EntryNotFoundError: no such entry, or several without a choice.

    Example:
        >>> outcomes = export_store(open_store("cohort.zarr"), "out", "trident")     # doctest: +SKIP
    """
    if format not in WRITERS:
        raise StoreError(f"got format {format!r} → expected one of {', '.join(WRITERS)} → choose one of these")
    out, entry = Path(out), _entry(store, entry)
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not overwrite):
        raise StoreError(
            f"got {out} to export to → it is not an empty folder → choose another --out, or add --overwrite"
        )
    with clear_when_full(out):
        out.mkdir(parents=True, exist_ok=True)
    slides, outcomes = store.slide_ids(entry), []
    for slide_id in slides:
        try:
            bag = _bag(store, slide_id, entry)
            with clear_when_full(out, bag.features.nbytes):
                WRITERS[format](out, bag)
            outcome = Outcome(slide_id, "imported", "", len(bag.features), bag.coords is not None)
        except StoreFullError:
            raise
        except (ExtractError, OSError) as error:
            outcome = Outcome(slide_id, "failed", str(error))
        outcomes.append(outcome)
        if progress is not None:
            progress(len(slides), outcome)
    return outcomes


def _entry(store: Store, entry: str | None) -> str:
    entries = store.entries()
    if entry is None and len(entries) != 1:
        raise EntryNotFoundError(
            f"got {len(entries)} features entries in {store.path} → expected a choice among {entries} → add --as"
        )
    entry = entries[0] if entry is None else entry
    store.feature_recipe(entry)
    return entry


def _bag(store: Store, slide_id: str, entry: str) -> Bag:
    """Read a slide, checking its features against their checksum."""
    slide = store[slide_id]
    slide.verify_features(entry)
    coords = slide.coords(entry) if "coords" in slide.record["sha256"] else None
    return Bag(slide_id, entry, slide.features(entry), coords, slide.record, store.tile_recipe)


def _place(folder: Path, slide_id: str, suffix: str) -> Path:
    """The file of a slide: its id as path where every part is an ordinary name, else its encoded id."""
    parts = slide_id.split("/")
    plain = all(part and not part.startswith((".", "~")) and "\\" not in part and "\0" not in part for part in parts)
    path = folder.joinpath(*parts) if plain else folder / encode_id(slide_id)
    path = path.with_name(path.name + suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write beside the path and rename, so that a file that exists is whole."""
    partial = partial_path(path)
    try:
        write(partial)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(partial, path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)


def _write_h5(
    path: Path, bag: Bag, coords_attributes: Mapping[str, Any], feature_attributes: Mapping[str, Any]
) -> None:
    import h5py

    def write(partial: Path) -> None:
        with h5py.File(partial, "w", locking=False) as file:
            file.create_dataset("features", data=bag.features)
            file["features"].attrs.update(feature_attributes)
            if bag.coords is not None:
                file.create_dataset("coords", data=bag.coords)
                file["coords"].attrs.update(coords_attributes)

    _write_whole(path, write)


def write_trident(out: Path, bag: Bag) -> None:
    """``<slide>.h5`` with features, coords and the attributes that TRIDENT's readers look for.

    Raises:
        StoreError: the slide has no coordinates.
    """
    if bag.coords is None:
        raise StoreError(
            f"got slide {bag.slide_id!r} without coordinates → TRIDENT's files need them → export as clam instead"
        )
    # what TRIDENT itself said, where it comes from there, is more exact than what our record tells
    facts = coords_attributes(bag.record, bag.recipe, bag.slide_id, str(out)) | _imported(bag, "coords")
    _write_h5(_place(out, bag.slide_id, ".h5"), bag, facts, {"name": bag.slide_id} | _imported(bag, "features"))


def _imported(bag: Bag, name: str) -> dict[str, Any]:
    """What a TRIDENT or CLAM file said of one of its datasets when it was imported."""
    origin = bag.record.get("import") or {}
    if origin.get("layout") not in ("trident", "clam"):
        return {}
    return {key: value for key, value in origin["attributes"].get(name, {}).items() if value is not None}


def write_clam(out: Path, bag: Bag) -> None:
    """``pt_files/<slide>.pt`` and ``h5_files/<slide>.h5`` with the same features, the h5 with the coordinates too."""
    import torch

    known = {"patch_size", "patch_level", "downsample", "downsampled_level_dim", "level_dim"}
    facts = {key: value for key, value in _imported(bag, "coords").items() if key in known}
    _write_h5(_place(out / "h5_files", bag.slide_id, ".h5"), bag, facts, {})

    def write(partial: Path) -> None:
        # the store's view is read-only, which torch warns about
        torch.save(torch.from_numpy(np.array(bag.features)), partial)

    _write_whole(_place(out / "pt_files", bag.slide_id, ".pt"), write)


def write_spatial(out: Path, bag: Bag) -> None:
    """``<slide>.zarr``, a SpatialData group with one table."""
    frame = {"tile_px": bag.record.get("tile_px"), "tile_l0": bag.record.get("tile_l0")}
    mpp = bag.record.get("mpp") or {}
    frame |= {"native_mpp": mpp.get("native"), "mpp": mpp.get("achieved"), "slide_id": bag.slide_id}
    _write_whole(
        _place(out, bag.slide_id, ".zarr"),
        lambda partial: write_spatialdata(partial, bag.entry, bag.features, bag.coords, frame),
    )


WRITERS: dict[str, Callable[[Path, Bag], None]] = {
    "trident": write_trident,
    "clam": write_clam,
    "spatialdata": write_spatial,
}
