"""What a store holds: its slides, entries and scales, what is complete, and what it weighs on disk.

Linear in the number of slides: one record is read per unit, and no embedding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from extract.errors import ExtractError, StoreUnreachableError
from extract.store.core.recipes import tiles_text
from extract.store.core.remote_path import StorePath
from extract.store.core.slide_reader import SlideReader
from extract.store.core.store import Store

QUARANTINE = "quarantine"
"""The folder of a store that holds what was moved aside; no reader looks into it."""

COMPLETE, PARTIAL, WITHOUT, DAMAGED, WAITING = "complete", "partial", "without", "damaged", "waiting"
"""What a slide has in an entry: features of its tiles; saved rows of a run that was stopped; nothing; a unit whose
record cannot be used, or is of other tiles; features whose tiles are missing."""


@dataclass(frozen=True)
class EntrySummary:
    """One entry of features.

    Attributes:
        name: name of the entry.
        backbone: name of its backbone; None where the entry's recipe cannot be read, as for the next two.
        dim: features per tile.
        dtype: ``float16`` or ``float32``.
        complete: slides with features of their tiles.
        partial: slides with saved rows of a run that was stopped, or goes on.
        without: slides with tiles and nothing else.
        damaged: slides whose features cannot be used.
        waiting: slides with features but no tiles.
        rows: embeddings of the complete slides.
        n_bytes: size on disk.
    """

    name: str
    backbone: str | None
    dim: int | None
    dtype: str | None
    complete: int
    partial: int
    without: int
    damaged: int
    waiting: int
    rows: int
    n_bytes: int


@dataclass(frozen=True)
class SlideSummary:
    """One slide.

    Attributes:
        slide_id: the slide's id.
        n_tiles: tiles; None where the record of the tiles cannot be read, or there is none, as for the next four.
        native_mpp: µm/px of level 0, or None when unknown.
        achieved_mpp: µm/px of the tiles, or None when unknown.
        mpp_source: where the native mpp is from.
        synthetic: whether the slide was drawn by a program.
        entries: entry → ``complete``, ``partial``, ``without``, ``damaged`` or ``waiting``.
        n_bytes: size on disk of its tiles and features.
        problem: why its tiles cannot be used, or None.
    """

    slide_id: str
    n_tiles: int | None
    native_mpp: float | None
    achieved_mpp: float | None
    mpp_source: str | None
    synthetic: bool
    entries: Mapping[str, str]
    n_bytes: int
    problem: str | None = None


@dataclass(frozen=True)
class StoreSummary:
    """A store at a glance.

    Attributes:
        path: its folder.
        format: ``zarr`` or ``h5``.
        tile_px: side of a tile in pixels.
        mpp: µm/px that was asked for, or None for each slide's own, or an unknown one.
        tiles: the two in words.
        n_tiles: tiles of all slides.
        entries: the entries by name.
        slides: the slides by id.
        n_bytes: size on disk of everything in the folder.
        n_leftovers: files and folders that are neither unit nor metadata: drafts, half-built units.
        leftover_bytes: their size.
        quarantine_bytes: size of what was moved aside.
    """

    path: StorePath
    format: str
    tile_px: int
    mpp: float | None
    tiles: str
    n_tiles: int
    entries: tuple[EntrySummary, ...]
    slides: tuple[SlideSummary, ...]
    n_bytes: int
    n_leftovers: int
    leftover_bytes: int
    quarantine_bytes: int

    def mpp_range(self, name: str) -> tuple[float, float] | None:
        """Smallest and largest ``native_mpp`` or ``achieved_mpp`` of the slides, or None when all are unknown."""
        values = [value for slide in self.slides if (value := getattr(slide, name)) is not None]
        return (min(values), max(values)) if values else None


def summarise(store: Store) -> StoreSummary:
    """Look at every unit of a store once. What cannot be read is counted, not raised.

    Args:
        store: an open store.
    """
    names = store.entries()
    tiles = store.unit_paths()
    features = {name: _units(store, name) for name in names}
    leftovers = store.leftovers()
    drafts = {(path.parent, _drafted(path)) for path in leftovers if path.suffix == ".draft"}
    slides, rows, sizes = [], dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for slide_id in sorted(set(tiles).union(*features.values())):
        reader, record, problem = _open(store, slide_id) if slide_id in tiles else (None, {}, "no tiles")
        n_bytes = store.size_of(tiles[slide_id]) if slide_id in tiles else 0
        states = {}
        for name in names:
            unit = features[name].get(slide_id)
            states[name], n_rows = _state(store, slide_id, name, unit, reader, drafts)
            size = store.size_of(unit) if unit is not None else 0
            rows[name] += n_rows
            sizes[name] += size
            n_bytes += size
        slides.append(_slide(slide_id, record, states, n_bytes, problem))
    return StoreSummary(
        path=store.path,
        format=store.format,
        tile_px=store.tile_recipe.tile_px,
        mpp=store.tile_recipe.mpp,
        tiles=tiles_text(store.tile_recipe),
        n_tiles=sum(slide.n_tiles or 0 for slide in slides),
        entries=tuple(_entry(store, name, slides, rows[name], sizes[name]) for name in names),
        slides=tuple(slides),
        n_bytes=store.size_of(store.path),
        n_leftovers=len(leftovers),
        leftover_bytes=sum(store.size_of(path) for path in leftovers),
        quarantine_bytes=store.size_of(store.path / QUARANTINE),
    )


def _drafted(draft: StorePath) -> str:
    """Name of the unit that a draft is of."""
    return draft.name.removeprefix("~").removesuffix(".draft")


def _units(store: Store, entry: str) -> dict[str, StorePath]:
    """The units of an entry; none where its recipe cannot be read."""
    try:
        return store.unit_paths(entry)
    except StoreUnreachableError:
        raise
    except (ExtractError, OSError, LookupError, ValueError, TypeError):
        return {}


def _open(store: Store, slide_id: str) -> tuple[SlideReader | None, Mapping[str, Any], str | None]:
    """A slide, its record, and why it cannot be used."""
    try:
        reader = SlideReader(store, slide_id)
        return reader, reader.record, None
    except StoreUnreachableError:
        raise
    except (ExtractError, OSError) as error:
        return None, {}, str(error)


def _state(
    store: Store,
    slide_id: str,
    entry: str,
    unit: StorePath | None,
    reader: SlideReader | None,
    drafts: set[tuple[StorePath, str]],
) -> tuple[str, int]:
    """What a slide has in an entry, and how many rows that are complete."""
    if unit is None:
        place = store.feature_path(slide_id, entry)
        return (PARTIAL if (place.parent, place.name) in drafts else WITHOUT), 0
    if reader is None:
        return WAITING, 0
    try:
        return COMPLETE, int(reader.feature_record(entry)["n_tiles"])
    except StoreUnreachableError:
        raise
    except (ExtractError, OSError, LookupError, ValueError, TypeError):
        return DAMAGED, 0


def _slide(
    slide_id: str, record: Mapping[str, Any], states: Mapping[str, str], n_bytes: int, problem: str | None
) -> SlideSummary:
    mpp = record.get("mpp") or {}
    n_tiles = record.get("n_tiles")
    return SlideSummary(
        slide_id,
        n_tiles if isinstance(n_tiles, int) else None,
        mpp.get("native"),
        mpp.get("achieved"),
        mpp.get("source"),
        bool(record.get("synthetic")),
        states,
        n_bytes,
        problem,
    )


def _entry(store: Store, name: str, slides: list[SlideSummary], rows: int, n_bytes: int) -> EntrySummary:
    states = [slide.entries[name] for slide in slides]
    complete, partial, without, damaged, waiting = (
        states.count(state) for state in (COMPLETE, PARTIAL, WITHOUT, DAMAGED, WAITING)
    )
    try:
        recipe = store.feature_recipe(name)
        backbone, dim, dtype = recipe.backbone, recipe.dim, recipe.dtype
    except (ExtractError, OSError, LookupError, ValueError, TypeError):
        backbone, dim, dtype = None, None, None
    return EntrySummary(
        name, backbone, dim, dtype, complete, partial, without, damaged, waiting, rows=rows, n_bytes=n_bytes
    )
