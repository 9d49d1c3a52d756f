"""Tissue and tiles of a slide as GeoJSON."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from extract.errors import StoreError
from extract.store import SlideReader, Store, open_store
from extract.store.core.remote_path import StorePath
from extract.store.core.unit import encode_id
from mil.errors import ConfigError, listed
from mil.files import write_atomically
from mil.visualization.slide_card import DAMAGES, Progress, entries_shown, first_features, flag_masks, tissue_mask_of


def write_geojson(
    store: Store | str | StorePath, folder: str | Path, entry: str | None = None, progress: Progress | None = None
) -> list[Path]:
    """Write each slide's tissue and tiles as GeoJSON that QuPath opens in the right place; return the files.

    The files are ``<slide id>.tissue.geojson`` and ``<slide id>.tiles.geojson``, the id percent-encoded as in the
    store. A flagged tile has the class ``Tile: <flag>``. A slide without a tissue mask, or without the frame of its
    tiles, as imported ones may be, has no such file.

    Args:
        store: an open store or its folder.
        folder: where the files go; made if absent.
        entry: the features entry whose flags are written; by default each slide's first one.
        progress: told (slides done, slides in all).

    Raises:
        ConfigError: ``folder`` is a file.
        EntryNotFoundError: the store has no such entry.
        StoreError: slides of the store are damaged; the files of all others are written first.
    """
    folder = Path(folder)
    store = store if isinstance(store, Store) else open_store(store)
    entries = entries_shown(store, entry)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"got {folder} for GeoJSON files → expected a folder → choose another one") from error
    written, damaged = [], {}
    slide_ids = store.slide_ids()
    for done, slide_id in enumerate(slide_ids, start=1):
        try:
            documents = dict(_outlines(store[slide_id], entries))
        except DAMAGES as error:
            documents, damaged[slide_id] = {}, error
        for kind, document in documents.items():
            file = folder / f"{encode_id(slide_id)}.{kind}.geojson"
            write_atomically(file, json.dumps(document, separators=(",", ":")).encode())
            written.append(file)
        if progress is not None:
            progress(done, len(slide_ids))
    if damaged:
        raise StoreError(
            f"got {len(damaged)} damaged slides, {listed(damaged)} (the first: {next(iter(damaged.values()))}) → the "
            f"{len(written)} files of the others are written → extract these slides again"
        )
    return written


def _outlines(slide: SlideReader, entries: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The GeoJSON documents of a slide, those that its unit has the data for."""
    from extract.slides.geojson import tiles_geojson, tissue_geojson

    record = slide.record
    if "bounds_l0" not in record:
        return
    bounds_l0 = tuple(record["bounds_l0"])
    mask = tissue_mask_of(slide)
    if mask is not None:
        yield "tissue", tissue_geojson(mask, bounds_l0)
    if "tile_l0" in record:
        coords = slide.coords()
        _, features = first_features(slide, entries)
        flags = None if features is None else flag_masks(features, len(coords))
        yield "tiles", tiles_geojson(coords, record["tile_l0"], bounds_l0, flags)
