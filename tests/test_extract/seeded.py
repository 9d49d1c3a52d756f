"""Stores of seeded content, made without torch, so that a process which writes one starts in a moment.

What a slide holds follows from its id and a variant: two writers of one variant write the same bytes.
"""

import zlib
from pathlib import Path

import numpy as np

from extract.store import (
    Execution,
    FeatureRecipe,
    Store,
    TileRecipe,
    TilesUnit,
    TransformRecipe,
    create_store,
    fingerprint,
)
from extract.store.core.fingerprint import sha256_of
from extract.store.formats.opening import BACKENDS

FORMATS = tuple(BACKENDS)
TILES = TileRecipe()
EXECUTION = Execution("fp32", "torch", "cpu", 4, {"torch": "2"})
ENTRY = "tiny"
DIM = 16
RECIPE = FeatureRecipe(
    "tiny", "tiny", "1", "0" * 64, "model", TransformRecipe(64, "bicubic", (0.5,) * 3, (0.5,) * 3), dim=DIM
)
SLIDES = ("site A/slide 1", "site B/slide 1", "long " * 60, "日本 100 %")


def make_store(folder: Path, backend: str = "zarr") -> Store:
    """A store with one entry, opened for writing."""
    store = create_store(folder, TILES, backend)
    store.create_entry(ENTRY, RECIPE)
    return store


def n_tiles(slide_id: str) -> int:
    """Tiles of a slide, 20 to 59."""
    return 20 + zlib.crc32(slide_id.encode()) % 40


def tiles_of(slide_id: str, variant: int = 0) -> TilesUnit:
    """Where a slide is cut."""
    rng = np.random.default_rng([zlib.crc32(slide_id.encode()), variant])
    n = n_tiles(slide_id)
    return TilesUnit(
        slide_id,
        rng.integers(0, 1 << 20, (n, 2), dtype=np.int32),
        rng.random(n, dtype=np.float32),
        rng.integers(0, 255, (9, 12, 3), dtype=np.uint8),
        {"mpp": {"native": 0.5, "requested": 0.5, "achieved": 0.5, "source": "seeded"}, "variant": variant},
        rng.random((9, 12)) < 0.5,
    )


def rows_of(slide_id: str, variant: int = 0) -> tuple[np.ndarray, list[int]]:
    """Embeddings float16 [n_tiles, 16] of a slide and the rows that could not be decoded, which are zero."""
    rng = np.random.default_rng([zlib.crc32(slide_id.encode()), variant, 1])
    n = n_tiles(slide_id)
    features = rng.normal(size=(n, DIM)).astype(np.float16)
    invalid = sorted(rng.choice(n, 3, replace=False).tolist())
    features[invalid] = 0
    return features, invalid


def flags_of(slide_id: str) -> np.ndarray:
    """Quality flags uint8 [n_tiles] of a slide."""
    return np.arange(n_tiles(slide_id), dtype=np.uint8)


def wrong_tiles(store: Store, slide_id: str, variant: int = 0) -> list[str]:
    """What of an accepted tiles unit is not as it was written."""
    unit, slide = tiles_of(slide_id, variant), store[slide_id]
    getattr(slide, "verify_tiles", int)()
    pairs = {
        "coords": (unit.coords, slide.coords()),
        "tissue_fraction": (unit.tissue_fraction, slide.tissue_fraction),
        "thumbnail": (unit.thumbnail, slide.thumbnail),
        "tissue_mask": (unit.tissue_mask, slide.tissue_mask),
    }
    wrong = [name for name, (written, read) in pairs.items() if not np.array_equal(written, read)]
    wrong += [key for key, value in unit.record.items() if slide.record.get(key) != value]
    checksums = {name: sha256_of(np.ascontiguousarray(written)) for name, (written, _) in pairs.items()}
    return [*wrong, *(["sha256"] if slide.record["sha256"] != checksums else [])]


def wrong_features(store: Store, slide_id: str, variant: int = 0) -> list[str]:
    """What of an accepted features unit is not as it was written."""
    (features, invalid), slide = rows_of(slide_id, variant), store[slide_id]
    slide.verify_features(ENTRY)
    record = slide.feature_record(ENTRY)
    keep = np.setdiff1d(np.arange(len(features)), invalid)
    found = {
        "features": np.array_equal(slide.features(ENTRY), features[keep]),
        "coords": np.array_equal(slide.coords(ENTRY), slide.coords()[keep]),
        "invalid_rows": record["invalid_rows"] == invalid,
        "sha256": record["sha256"] == sha256_of(features),
        "tiles_sha256": record["tiles_sha256"] == fingerprint(slide.record),
        "n_tiles": store.n_tiles(slide_id, ENTRY) == len(keep),
    }
    return [name for name, right in found.items() if not right]


def wrong_units(store: Store) -> list[str]:
    """Everything that a reader of the store accepts and that is not whole and right."""
    embedded = store.slide_ids(ENTRY) if ENTRY in store.entries() else []
    strange = sorted({*store.slide_ids(), *embedded} - set(SLIDES)) + sorted({*store.entries()} - {ENTRY})
    wrong = [f"{name!r} is listed" for name in strange]
    for slide_id in store.slide_ids():
        wrong += [f"{slide_id!r} tiles: {what}" for what in wrong_tiles(store, slide_id)]
    for slide_id in embedded:
        wrong += [f"{slide_id!r} features: {what}" for what in wrong_features(store, slide_id)]
    return wrong


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of the store's units and metadata; without run logs, caches and what writers left behind."""
    found = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    kept = (path for path in found if path.parts[0] not in ("runs", "index.json") and not is_left(path))
    return {path.as_posix(): (folder / path).read_bytes() for path in kept}


def is_left(path: Path) -> bool:
    """Whether a path in a store is a partial, a draft or its rows."""
    return any(part.startswith("~") for part in path.parts) or ".partial" in path.as_posix()


def left_in(folder: Path) -> list[str]:
    """What writers left behind: partials, drafts, rows."""
    return sorted(name for name in (p.relative_to(folder).as_posix() for p in folder.rglob("*")) if is_left(Path(name)))
