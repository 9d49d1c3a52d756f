"""Whether embeddings that are computed now agree with those that an entry holds already."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from extract.backbones.backbone import Backbone
from extract.errors import SlideError, StoreError, TileDecodeError
from extract.pipeline.jobs import Column
from extract.slides.finding.source import SlideSource
from extract.slides.opening import open_slide
from extract.store import Execution, SlideReader, Store, fingerprint
from extract.tiling.sameness import check_same
from extract.tiling.tiles import context_tiles, recorded_plan

_SLIDES_LOOKED_AT = 64

REFUSED_BELOW = 0.99
"""A mean cosine below this is another backbone, not another device."""


@dataclass(frozen=True)
class Parity:
    """How far new embeddings of stored tiles agree with the stored ones.

    Attributes:
        slide_id: the slide whose tiles were compared.
        tiles: how many.
        mean: mean cosine.
        least: smallest cosine.
    """

    slide_id: str
    tiles: int
    mean: float
    least: float


def find_parity(
    store: Store, sources: Sequence[SlideSource], column: Column, execution: Execution, default_mpp: float | None
) -> Parity | None:
    """Where an entry was begun otherwise (another device, precision, version), how far that agrees with what is now.

    Args:
        store: where the entry lies.
        sources: the slides of the run.
        column: the entry and what computes it now, without augmentation.
        execution: how it is computed now.
        default_mpp: ``--default-mpp``.

    Returns:
        The comparison on the first of a few slides that were computed otherwise and can be read; None without one.

    Raises:
        StoreError: the embeddings do not agree.
    """
    now = fingerprint(execution)
    done = (each for each in sources if store.has_features(each.slide_id, column.entry))
    some = islice(done, _SLIDES_LOOKED_AT)
    others = (each for each in some if _was_made_otherwise(store, each, column.entry, now))
    measured = (_try_parity(store, each, column, execution.batch_size, default_mpp) for each in others)
    return next(filter(None, measured), None)


def _was_made_otherwise(store: Store, source: SlideSource, entry: str, execution: str) -> bool:
    record = store[source.slide_id].feature_record(entry)
    return record["execution_fingerprint"] != execution and source.path.exists()


def _try_parity(
    store: Store, source: SlideSource, column: Column, batch_size: int, default_mpp: float | None
) -> Parity | None:
    """The comparison on one slide; None if it cannot be read, which is told when its turn comes."""
    try:
        reader = store[source.slide_id]
        check_same(source, reader.record, default_mpp)
        return measure_parity(reader, source, column.entry, column.backbone, batch_size)
    except (SlideError, OSError):
        return None


def measure_parity(
    reader: SlideReader, source: SlideSource, entry: str, backbone: Backbone, batch_size: int
) -> Parity | None:
    """Embed one batch of a slide's tiles again and compare.

    Args:
        reader: a slide with complete features in the entry, without augmentation.
        source: the same slide.
        entry: name of the features entry.
        backbone: what embeds now.
        batch_size: tiles per forward.

    Returns:
        The comparison; None if no tile could be read.

    Raises:
        StoreError: the embeddings do not agree.
    """
    plan, coords = recorded_plan(reader.record), reader.coords(entry)
    if backbone.recipe.context_mpp is not None:
        plan, coords = context_tiles(reader.record, coords, backbone.recipe.context_mpp)
    rows = np.unique(np.linspace(0, len(coords) - 1, min(batch_size, len(coords))).astype(int))
    pixels = np.zeros((batch_size, plan.tile_px, plan.tile_px, 3), dtype=np.uint8)
    read: list[int] = []
    slide = open_slide(source.path, source.slide_id)
    try:
        for row in rows:
            x_l0, y_l0 = (int(value) for value in coords[row])
            try:
                pixels[len(read)] = slide.read_tile(x_l0, y_l0, plan)
            except TileDecodeError:
                continue
            read.append(int(row))
    finally:
        slide.close()
    if not read:
        return None
    now = backbone.embed(pixels)[: len(read)].astype(np.float64)
    then = np.asarray(reader.features(entry)[read], dtype=np.float64)
    lengths = np.linalg.norm(now, axis=1) * np.linalg.norm(then, axis=1)
    with np.errstate(invalid="ignore"):
        cosines = (now * then).sum(axis=1) / lengths
    cosines[(now == then).all(axis=1)] = 1.0
    parity = Parity(source.slide_id, len(read), float(cosines.mean()), float(cosines.min()))
    # written so that NaN fails
    if not parity.mean >= REFUSED_BELOW:
        raise StoreError(
            f"got embeddings whose mean cosine with those in entry {entry!r} is {parity.mean:.4f} ({parity.tiles} "
            f"tiles of slide {source.slide_id!r}) → expected at least {REFUSED_BELOW} → another device, precision or "
            f"version computes something else: write to another entry with --as"
        )
    return parity
