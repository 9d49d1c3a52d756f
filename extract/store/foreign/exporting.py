"""Exporting: the bags of a store as files that other tools read unchanged."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from extract.errors import EntryNotFoundError, ExtractError, StoreError, StoreFullError
from extract.store import Store, TileRecipe
from extract.store.core.files import clear_when_full, disk_bytes, partial_path, replace_json, sync
from extract.store.core.fingerprint import fingerprint
from extract.store.core.unit import encode_id
from extract.store.foreign.importing import OnOutcome, Outcome
from extract.store.foreign.spatialdata import write_spatialdata
from extract.store.formats.tool_attributes import coords_attributes

_MARKER = ".tessera-export.json"
"""Lies in the folder while an export is under way, and says what it is to be."""


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
        keep: whether files that are there stay, since this export has written them before.
    """

    slide_id: str
    entry: str
    features: np.ndarray
    coords: np.ndarray | None
    record: Mapping[str, Any]
    recipe: TileRecipe
    keep: bool = False


def export_store(
    store: Store,
    out: str | Path,
    format: str,
    entry: str | None = None,
    overwrite: bool = False,
    progress: OnOutcome | None = None,
) -> list[Outcome]:
    """Write every slide of an entry for another tool. A slide that cannot be written is listed, and the others go on.

    What is there is whole. An export that was stopped goes on when it is repeated.

    Args:
        store: the store.
        out: folder; must be new or empty, unless ``overwrite``.
        format: ``trident``, ``clam`` or ``spatialdata``.
        entry: the features entry; may be left out where there is one.
        overwrite: replace files that are there.
        progress: called after each slide.

    Raises:
        StoreError: an unknown format, or ``out`` holds something else.
        StoreFullError: there is no room for all of it; nothing is written then. Or the room went meanwhile.
        EntryNotFoundError: no such entry, or several without a choice.

    Example:
        >>> outcomes = export_store(open_store("cohort.zarr"), "out", "trident")     # doctest: +SKIP
    """
    if format not in WRITERS:
        raise StoreError(f"got format {format!r} → expected one of {', '.join(WRITERS)} → choose one of these")
    out, entry = Path(out), _entry(store, entry)
    subject = {"format": format, "entry": entry, "store": fingerprint(store.feature_recipe(entry))}
    goes_on = not overwrite and _read_marker(out) == subject
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not overwrite and not goes_on):
        raise StoreError(
            f"got {out} to export to → it is not an empty folder → choose another --out, or add --overwrite"
        )
    slides, outcomes = store.slide_ids(entry), []
    _check_room(out, store, entry, slides, copies=2 if format == "clam" else 1)
    with clear_when_full(out):
        out.mkdir(parents=True, exist_ok=True)
        replace_json(out / _MARKER, subject)
    for slide_id in slides:
        try:
            bag = _bag(store, slide_id, entry)
            with clear_when_full(out, bag.features.nbytes):
                WRITERS[format](out, replace(bag, keep=goes_on))
            outcome = Outcome(slide_id, "imported", "", len(bag.features), bag.coords is not None)
        except StoreFullError:
            raise
        except (ExtractError, OSError) as error:
            outcome = Outcome(slide_id, "failed", str(error))
        outcomes.append(outcome)
        if progress is not None:
            progress(len(slides), outcome)
    (out / _MARKER).unlink(missing_ok=True)
    return outcomes


def _read_marker(out: Path) -> Any:
    """What an export that did not end was to be; None where there is none."""
    try:
        return json.loads((out / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _check_room(out: Path, store: Store, entry: str, slides: Sequence[str], copies: int) -> None:
    """Refuse to begin what cannot end.

    Raises:
        StoreFullError: the embeddings alone are larger than the room.
    """
    recipe = store.feature_recipe(entry)
    rows = sum(store.n_tiles(slide_id, entry) for slide_id in slides)
    needed = copies * rows * recipe.dim * np.dtype(recipe.dtype).itemsize
    folder = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.exists())
    free = shutil.disk_usage(folder).free + (disk_bytes(out) if out.is_dir() else 0)
    if needed > free:
        raise StoreFullError(
            f"got {free / 1e6:.1f} MB of free space for {out} → the embeddings of {len(slides)} slides need "
            f"{needed / 1e6:.1f} MB → free some space or choose another --out; nothing was written"
        )


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


def _write_whole(path: Path, bag: Bag, write: Callable[[Path], None]) -> None:
    """Write beside the path and rename, so that a file that exists is whole."""
    if bag.keep and path.exists():
        return
    partial = partial_path(path)
    try:
        write(partial)
        for folder, _, names in os.walk(partial):
            for name in names:
                sync(Path(folder, name))
        if partial.is_file():
            sync(partial)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)


def _write_bytes(path: Path, content: BytesIO) -> None:
    with open(path, "wb") as file:
        file.write(content.getbuffer())


def _write_h5(
    path: Path, bag: Bag, coords_attributes: Mapping[str, Any], feature_attributes: Mapping[str, Any]
) -> None:
    import h5py

    # in memory: the library may crash the process when the disk is full while it closes a file
    image = BytesIO()
    with h5py.File(image, "w") as file:
        file.create_dataset("features", data=bag.features)
        file["features"].attrs.update(feature_attributes)
        if bag.coords is not None:
            file.create_dataset("coords", data=bag.coords)
            file["coords"].attrs.update(coords_attributes)
    _write_whole(path, bag, lambda partial: _write_bytes(partial, image))


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

    image = BytesIO()
    # the store's view is read-only, which torch warns about
    torch.save(torch.from_numpy(np.array(bag.features)), image)
    _write_whole(_place(out / "pt_files", bag.slide_id, ".pt"), bag, lambda partial: _write_bytes(partial, image))


def write_spatial(out: Path, bag: Bag) -> None:
    """``<slide>.zarr``, a SpatialData group with one table."""
    frame = {"tile_px": bag.record.get("tile_px"), "tile_l0": bag.record.get("tile_l0")}
    mpp = bag.record.get("mpp") or {}
    frame |= {"native_mpp": mpp.get("native"), "mpp": mpp.get("achieved"), "slide_id": bag.slide_id}
    _write_whole(
        _place(out, bag.slide_id, ".zarr"),
        bag,
        lambda partial: write_spatialdata(partial, bag.entry, bag.features, bag.coords, frame),
    )


WRITERS: dict[str, Callable[[Path, Bag], None]] = {
    "trident": write_trident,
    "clam": write_clam,
    "spatialdata": write_spatial,
}
