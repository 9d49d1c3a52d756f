"""What a plan says: slides, entries, rates, times and sizes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from extract.folders import NotTaken
from extract.slides.finding.source import SlideSource
from extract.store.core.remote_path import StorePath


@dataclass(frozen=True)
class PlannedSlide:
    """What will become of one slide.

    Attributes:
        slide_id: its id.
        path: the file.
        outcome: ``embed``, ``complete`` (the store has it already) or ``fail``.
        reason: why it will fail, and what to do; empty otherwise.
        n_tiles: tiles on tissue.
        n_bytes: size of the embeddings that will be written for it.
        native_mpp: µm/px of level 0, or None where it is unknown.
        mpp_source: where that comes from.
        achieved_mpp: µm/px of the tiles.
        level: index of the level that tiles are read from.
        downsample: level-0 pixels per pixel of that level.
        resampled: whether tiles are resampled after reading.
        tissue_mm2: area of the tissue, or None where the scale is unknown.
        tissue_part: part of the scanned area that is tissue, or None where it was not looked for.
        reader: ``direct``, ``openslide`` or ``image``; empty where one tile was not enough to tell.
        reader_note: why it is not the fastest.
    """

    slide_id: str
    path: str
    outcome: str
    reason: str = ""
    n_tiles: int = 0
    n_bytes: int = 0
    native_mpp: float | None = None
    mpp_source: str = ""
    achieved_mpp: float | None = None
    level: int | None = None
    downsample: float | None = None
    resampled: bool | None = None
    tissue_mm2: float | None = None
    tissue_part: float | None = None
    reader: str = ""
    reader_note: str = ""


@dataclass(frozen=True)
class PlannedEntry:
    """One features entry that will be written.

    Attributes:
        name: of the entry.
        dim: features per tile.
        dtype: of the stored embeddings.
        context_mpp: µm/px of its context tiles, or None for the tiles themselves.
    """

    name: str
    dim: int
    dtype: str
    context_mpp: float | None = None

    @property
    def tile_bytes(self) -> int:
        """Bytes of one tile's embedding."""
        return self.dim * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class MeasuredRate:
    """How fast tiles of the first slides were read and embedded, after a warm-up.

    Attributes:
        tiles_per_s: tiles a second, each in all its views and contexts.
        device: what computed: its name, the precision, the runtime, the batch size.
        n_tiles: tiles that were counted, those of contexts included.
        n_different: how many different ones: where the first slides hold few, they are embedded again and again.
        seconds: over which they were counted.
        bottleneck: the stage that the others waited for.
    """

    tiles_per_s: float
    device: str
    n_tiles: int
    n_different: int
    seconds: float
    bottleneck: str


@dataclass(frozen=True)
class ExtractionPlan:
    """What an extraction will do.

    Attributes:
        slides: every slide, sorted by id.
        entries: the features entries that will be written.
        store: where the store will lie, or None.
        free_bytes: free disk space there, or None without a store, or where it lies at a URL.
        rate: measured, or None.
        cut_seconds: how long opening and cutting will take; `mil extract` does it again.
        start_seconds: how long it takes to load the backbones and to start the readers and the runtime, as measured;
            each run does it once.
        problems: what stands in the way of the whole run.
        not_taken: the files of given folders that are no slides, counted by their reason.
    """

    slides: tuple[PlannedSlide, ...]
    entries: tuple[PlannedEntry, ...]
    store: StorePath | None
    free_bytes: int | None
    rate: MeasuredRate | None
    cut_seconds: float
    problems: tuple[str, ...]
    start_seconds: float = 0.0
    not_taken: NotTaken = field(default_factory=NotTaken)

    @property
    def to_embed(self) -> tuple[PlannedSlide, ...]:
        """The slides that will be embedded."""
        return self._with("embed")

    @property
    def complete(self) -> tuple[PlannedSlide, ...]:
        """The slides that the store has already."""
        return self._with("complete")

    @property
    def failed(self) -> tuple[PlannedSlide, ...]:
        """The slides that will fail."""
        return self._with("fail")

    @property
    def n_tiles(self) -> int:
        """Tiles that will be embedded."""
        return sum(slide.n_tiles for slide in self.to_embed)

    @property
    def cache_bytes(self) -> int:
        """Size of the embeddings that will be written."""
        return sum(slide.n_bytes for slide in self.to_embed)

    @property
    def seconds(self) -> float | None:
        """How long it will take at the measured rate, start and cutting included; None without a rate.

        An upper bound on a GPU, where the next slides are cut beside.
        """
        if not self.n_tiles:
            return 0.0
        if self.rate is None:
            return None
        return self.start_seconds + self.cut_seconds + self.n_tiles / self.rate.tiles_per_s

    def _with(self, outcome: str) -> tuple[PlannedSlide, ...]:
        return tuple(slide for slide in self.slides if slide.outcome == outcome)


class PlanProgress(Protocol):
    """What planning tells while it goes on; called from one thread."""

    def start(self, n_slides: int) -> None:
        """Slides are being cut."""

    def slide_done(self, slide: PlannedSlide) -> None:
        """One more slide is planned."""

    def measuring(self, device: str) -> None:
        """All are planned, and the rate is being measured."""


class SilentPlan:
    """A `PlanProgress` that says nothing."""

    def start(self, n_slides: int) -> None:
        """Nothing."""

    def slide_done(self, slide: PlannedSlide) -> None:
        """Nothing."""

    def measuring(self, device: str) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Sample:
    """Some tiles of a slide, to measure with."""

    source: SlideSource
    record: Mapping[str, Any]
    coords: np.ndarray
