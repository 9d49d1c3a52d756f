"""Slides made ready for the stream: cut where they are not, claimed, and given the rows that an earlier run saved."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from extract.channel import Message
from extract.errors import ExtractError, ReaderError, SlideChangedError, SlideUnreadableError
from extract.geometry import ReadPlan
from extract.pipeline.claims import Claims
from extract.pipeline.config import ReadingConfig
from extract.pipeline.jobs import Column, SlideJob
from extract.reading.answers import rebuild_error
from extract.reading.reader import cut_request, probe_request
from extract.reading.readers import Readers
from extract.slides.finding.source import SlideSource
from extract.store import SlideReader, Store, TileRecipe, TilesUnit
from extract.store.core.draft import Draft
from extract.store.core.remote_path import RemotePath
from extract.store.upkeep.repair import set_aside
from extract.tiling.pen import is_dark_field
from extract.tiling.sameness import check_same
from extract.tiling.tiles import context_tiles, recorded_plan

_LOOK_S = 0.2
_TILES_TRIED = 64
"""Of tiles that could not be decoded, how many are tried again to see whether they can be now."""


class StoppedError(Exception):
    """The run was asked to stop while something was waited for."""


@dataclass
class PreparedSlide:
    """One slide of the run: its jobs that are not written yet, and what went wrong."""

    source: SlideSource
    started: float = field(default_factory=time.monotonic)
    jobs_left: int = 0
    n_tiles: int = 0
    n_resumed: int = 0
    dark: bool = False
    flags: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint8))
    read_by: str = ""
    damage: str = ""
    error: Exception | None = None


class Preparation:
    """Makes jobs of slides; several threads may ask at once.

    Args:
        store: where tiles go.
        columns: what is computed of each slide.
        reading: how slides are read.
        readers: cut them.
        claims: tell other runs.
        stop: asks the run to stop.
        warn: tells the user something.
    """

    def __init__(
        self,
        store: Store,
        columns: Sequence[Column],
        reading: ReadingConfig,
        readers: Readers,
        claims: Claims,
        stop: threading.Event,
        warn: Callable[[str], None],
    ) -> None:
        self._store, self._columns, self._reading, self._readers = store, columns, reading, readers
        self._claims, self._stop, self._warn = claims, stop, warn

    def prepare(self, source: SlideSource) -> tuple[PreparedSlide, list[SlideJob]]:
        """Cut the slide if it is not yet cut; no job if its features are complete.

        Raises:
            SlideError: it cannot be cut, or is another one than was cut before.
            SlideClaimedError: another run is at work on it.
            StoppedError: the run was asked to stop.
        """
        if not source.path.exists():
            raise SlideUnreadableError(f"got {source.path} → there is no such file → check the path")
        if source.slide_id in self._store:
            self._check_same(source)
        slide = PreparedSlide(source)
        self._try_again(source)
        missing = [c for c in self._columns if not self._store.has_features(source.slide_id, c.entry)]
        if not missing:
            return slide, []
        if source.slide_id not in self._store:
            self._store.write_tiles(self._cut(source))
        tiles = self._store[source.slide_id]
        slide.n_tiles = len(tiles.coords())
        slide.dark = self._is_dark(tiles)
        jobs = self._make_jobs(slide, tiles, missing)
        slide.jobs_left = len(jobs)
        return slide, jobs

    def _check_same(self, source: SlideSource) -> None:
        """A slide that was given is the one that was cut; of one that failed for its tiles, a better copy is taken.

        Raises:
            SlideChangedError: it is another.
        """
        tiles = self._store[source.slide_id]
        try:
            check_same(source, tiles.record, self._reading.default_mpp)
        except SlideChangedError:
            done = [entry for entry in self._store.entries() if self._store.has_features(source.slide_id, entry)]
            parts = [invalid_part(tiles.feature_record(entry)) for entry in done]
            if not parts or min(parts) <= self._reading.max_invalid or isinstance(self._store.path, RemotePath):
                raise
            set_aside(self._store, [source.slide_id])
            self._warn(
                f"slide {source.slide_id!r} is another file than the one of which {min(parts):.0%} of the tiles could "
                f"not be decoded: it is cut and embedded anew, what was there is in quarantine"
            )

    def _try_again(self, source: SlideSource) -> None:
        """Where tiles could not be decoded before and can be now, move the embeddings aside: they are made anew."""
        if source.slide_id not in self._store or isinstance(self._store.path, RemotePath):
            return
        tiles, invalid = self._store[source.slide_id], set[int]()
        for column in self._columns:
            if self._store.has_features(source.slide_id, column.entry) and column.backbone.recipe.context_mpp is None:
                invalid |= set(tiles.feature_record(column.entry)["invalid_rows"])
        if not invalid or tiles.coords() is None:
            return
        rows = sorted(invalid)[:: -(-len(invalid) // _TILES_TRIED)]
        corners = [(int(x), int(y)) for x, y in tiles.coords()[rows]]
        request = probe_request(source, self._reading.reader, recorded_plan(tiles.record), corners)
        answer, _ = self._ask(request)
        if answer.get("readable", 0):
            set_aside(self._store, [source.slide_id], tiles=False)
            self._warn(f"slide {source.slide_id!r}: tiles that could not be decoded can be now; it is embedded anew")

    def _is_dark(self, tiles: SlideReader) -> bool:
        """Whether it is a dark-field image, on which there is no ink; the user is told where tissue was looked for."""
        try:
            dark = is_dark_field(tiles.thumbnail, self._store.tile_recipe.quality.pen)
        except ExtractError:
            # its tiles can be embedded without a picture
            return False
        if dark and tiles.record["tissue"]["method"] in ("default", "saturation"):
            self._warn(
                f"slide {tiles.slide_id!r} is nearly all dark: a fluorescence or dark-field image? Tissue is told by "
                f"the colour of stains on light glass; if some is missing, use --tissue none, or give a mask"
            )
        return dark

    def _cut(self, source: SlideSource) -> TilesUnit:
        """Have the readers cut a slide."""
        reading = self._reading
        answer, arrays = self._ask(cut_request(source, reading.reader, self._store.tile_recipe, reading.default_mpp))
        if "error" in answer:
            raise rebuild_error(answer["error"], source.slide_id)
        coords, fraction, thumbnail, *mask = arrays
        unit = TilesUnit(source.slide_id, coords, fraction, thumbnail, answer["record"], *mask)
        _check_unit(unit, self._store.tile_recipe)
        return unit

    def _ask(self, request: Mapping[str, Any]) -> Message:
        """The readers' answer, as long as the run is not stopped."""
        future = self._readers.request(request)
        while not wait([future], _LOOK_S).done:
            # what they are at cannot be interrupted, but the run can
            if self._stop.is_set():
                raise StoppedError
        return future.result()

    def _make_jobs(self, slide: PreparedSlide, tiles: SlideReader, missing: Sequence[Column]) -> list[SlideJob]:
        """One job for the tiles, and one for each context around them; the claims are given back if that fails."""
        slide_id = slide.source.slide_id
        drafts = self._claims.open(slide_id, missing)
        try:
            # another process may have committed between the look and the claim
            for column in missing:
                if self._store.has_features(slide_id, column.entry):
                    self._claims.take(slide_id, column.entry).discard()
                    drafts.pop(column.entry)
            return self._make_claimed_jobs(slide, tiles, drafts)
        except BaseException:
            self._claims.release(slide_id, drafts)
            raise

    def _make_claimed_jobs(
        self, slide: PreparedSlide, tiles: SlideReader, drafts: Mapping[str, Draft]
    ) -> list[SlideJob]:
        missing = [column for column in self._columns if column.entry in drafts]
        plan, coords = recorded_plan(tiles.record), tiles.coords()
        seed = str(tiles.record["slide"]["sampled_sha256"])
        jobs = []
        for mpp in dict.fromkeys(column.backbone.recipe.context_mpp for column in missing):
            columns = tuple(column for column in missing if column.backbone.recipe.context_mpp == mpp)
            where = (plan, coords) if mpp is None else context_tiles(tiles.record, coords, mpp)
            quality = self._store.tile_recipe.quality if mpp is None else None
            taken = tuple(drafts[column.entry] for column in columns)
            job = _make_job(slide.source, columns, taken, *where)
            job.reader, job.quality, job.seed = self._reading.reader, quality, seed
            slide.n_resumed = max(slide.n_resumed, job.first_row)
            jobs.append(job)
        return jobs


def invalid_part(record: Mapping[str, Any]) -> float:
    """Part of a slide's tiles that could not be decoded, by the record of its embeddings."""
    return len(record["invalid_rows"]) / max(int(record["n_tiles"]), 1)


def _make_job(
    source: SlideSource, columns: tuple[Column, ...], drafts: tuple[Draft, ...], plan: ReadPlan, coords: np.ndarray
) -> SlideJob:
    """A job with the rows that an earlier run saved in their places."""
    first_row = min(len(draft.features) for draft in drafts)
    features = []
    for column, draft in zip(columns, drafts, strict=True):
        matrix = np.zeros((len(coords), column.backbone.recipe.dim), dtype=column.backbone.recipe.dtype)
        matrix[:first_row] = draft.features[:first_row]
        features.append(matrix)
    flags = np.zeros(len(coords), dtype=np.uint8)
    flags[:first_row] = drafts[0].flags[:first_row]
    return SlideJob(
        source.slide_id,
        source.path,
        coords,
        plan,
        columns,
        tuple(features),
        drafts=drafts,
        first_row=first_row,
        flags=flags,
    )


def _check_unit(unit: TilesUnit, recipe: TileRecipe) -> None:
    """The process that reads strangers' files is believed no further than this.

    Raises:
        ReaderError: what it sent is no tiles unit of this recipe.
    """
    if unit.coords is None or unit.tissue_fraction is None or unit.thumbnail is None:
        raise ReaderError(f"got tiles of slide {unit.slide_id!r} without coords, tissue or thumbnail → not stored")
    n, size = len(unit.coords), unit.thumbnail.shape[:2]
    right = (
        n > 0
        and (unit.coords.shape, unit.coords.dtype) == ((n, 2), np.dtype(np.int32))
        and (unit.tissue_fraction.shape, unit.tissue_fraction.dtype) == ((n,), np.dtype(np.float32))
        and (unit.thumbnail.shape, unit.thumbnail.dtype) == ((*size, 3), np.dtype(np.uint8))
        and (unit.tissue_mask is None or unit.tissue_mask.shape == size)
        and unit.record["tile_px"] == recipe.tile_px
    )
    if not right:
        raise ReaderError(f"got tiles of slide {unit.slide_id!r} that make no sense → check the file; copy it again")
