"""How fast this machine reads and embeds, measured on a sample of the slides."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle

import numpy as np
import torch

from extract.backbones.backbone import Backbone
from extract.backbones.presets import find_preset
from extract.errors import BackboneError, ExtractError, RuntimeConversionError
from extract.pipeline.config import EntryConfig, ExtractionConfig
from extract.pipeline.jobs import (
    CPU_BATCH_SIZE,
    GPU_BATCH_SIZE,
    Column,
    SlideJob,
    available_cores,
    entry_name,
    make_columns,
    ring_slots,
    workers,
)
from extract.pipeline.stream import Stream
from extract.planning.planned import MeasuredRate, PlannedEntry, PlanProgress, Sample
from extract.reading.isolation import ReaderProcess
from extract.reading.readers import LocalReaders, Readers, reading_threads
from extract.reading.ring import Ring, RingShape
from extract.tiling.tiles import context_tiles, recorded_plan

_GIVE_UP_S = 120.0


@dataclass(frozen=True)
class PlanModel:
    """A backbone that is loaded, or of which only the preset is known."""

    name: str
    dim: int
    dtype: str
    backbone: Backbone | None = None
    problem: str = ""

    @classmethod
    def of(cls, backbone: Backbone) -> "PlanModel":
        """A loaded one."""
        recipe = backbone.recipe
        return cls(recipe.backbone, recipe.dim, recipe.dtype, backbone)

    def entries(self, config: EntryConfig) -> list[PlannedEntry]:
        """What it will write; named as `extract.pipeline.jobs.make_columns` names it."""
        name = config.entry or entry_name(self.name)
        plain = PlannedEntry(name, self.dim, self.dtype)
        views = [replace(plain, name=f"{name}@view-{view}") for view in range(1, config.views + 1)]
        contexts = [replace(plain, name=f"{name}@context-{mpp:g}", context_mpp=mpp) for mpp in config.context_mpp]
        return [plain, *views, *contexts]


def find_model(given: str | Backbone, config: ExtractionConfig, needed: bool) -> PlanModel:
    """The backbone, loaded; or what its preset declares, where that is enough or all that can be had.

    Args:
        given: a name, or a loaded backbone.
        config: how it is loaded.
        needed: whether the backbone is needed itself, and not its declared size alone.
    """
    if isinstance(given, Backbone):
        return PlanModel.of(given)
    preset = find_preset(given)
    if preset is None:
        return PlanModel.of(config.load(given))
    pooling, dtype = config.backbone.pooling, config.backbone.dtype
    dim = preset.dim if pooling == "model" else preset.dims.get(pooling)
    if dim is not None and not needed:
        return PlanModel(preset.name, dim, dtype)
    try:
        return PlanModel.of(config.load(given))
    except BackboneError as error:
        # the slides can be planned without its weights, and the user learns all at once
        return PlanModel(preset.name, preset.dim, dtype, problem=str(error))


class _Clock:
    """Counts tiles after a warm-up, until enough time has gone by."""

    def __init__(self, warm_up: int, seconds: float) -> None:
        self._warm_up, self._seconds = warm_up, seconds
        self._marks: list[tuple[float, int]] = []
        self._lock = threading.Lock()
        self._give_up = time.monotonic() + max(_GIVE_UP_S, seconds)

    def tiles_done(self, n: int) -> None:
        """A batch is embedded."""
        with self._lock:
            self._marks.append((time.monotonic(), n))

    @property
    def first_at(self) -> float:
        """When the first batch was embedded."""
        return self._marks[0][0]

    def enough(self) -> bool:
        """Whether the time is up."""
        warm = len(self._marks) > self._warm_up
        now = time.monotonic()
        return now > self._give_up or (warm and now - self._marks[self._warm_up - 1][0] >= self._seconds)

    def count(self, started: float) -> tuple[int, float]:
        """Tiles, and seconds; all of them where there was no time for more than the warm-up."""
        begin, first = (
            (self._marks[self._warm_up - 1][0], self._warm_up) if len(self._marks) > self._warm_up else (started, 0)
        )
        # in the end fewer and fewer batches are under way: what comes after the time is up does not count
        counted = [mark for mark in self._marks[first:] if mark[0] - begin <= self._seconds] or self._marks[first:]
        return sum(n for _, n in counted), max((counted[-1][0] if counted else started) - begin, 1e-9)


def measure_rates(
    config: ExtractionConfig,
    models: Sequence[PlanModel],
    samples: Sequence[Sample],
    seconds: float,
    progress: PlanProgress,
) -> tuple[MeasuredRate | None, float, str]:
    """Embed sampled tiles through the ordinary stream; the rate, seconds to the first batch, or why there is none."""
    began = time.monotonic()
    backbones = [model.backbone for model in models if model.backbone is not None]
    device = backbones[0].device
    size = config.compute.batch_size or (CPU_BATCH_SIZE if device.type == "cpu" else GPU_BATCH_SIZE)
    try:
        for backbone in backbones:
            _use_runtime(backbone, config.compute.runtime, size)
    except ExtractError as error:
        return None, 0.0, str(error)
    columns = [column for backbone in backbones for column in make_columns(backbone, config.entries)]
    execution = backbones[0].execution(size)
    where = f"{execution.device} ({execution.precision}, {execution.runtime}, batch size {size})"
    progress.measuring(where)
    clock, started = _Clock(2 * workers(device), seconds), time.monotonic()
    errors: list[Exception | None] = []
    with _readers(config, device, size) as (ring, readers):
        stream = Stream(ring, readers, device, lambda job: errors.append(job.error), clock.tiles_done, clock.enough)
        try:
            stream.run(_jobs(config, samples, columns, clock))
        except ExtractError as error:
            errors.append(error)
    errors = [error for error in errors if error is not None]
    n_rows, measured_s = clock.count(started)
    if errors or not n_rows:
        return None, 0.0, f"no rate could be measured: {errors[0] if errors else 'no tile was embedded in time'}"
    kinds = len({column.backbone.recipe.context_mpp for column in columns})
    n_different = min(n_rows, kinds * sum(len(sample.coords) for sample in samples))
    rate = n_rows / kinds / measured_s
    measured = MeasuredRate(rate, where, n_rows, n_different, measured_s, stream.stats.bottleneck)
    return measured, clock.first_at - began, ""


def _use_runtime(backbone: Backbone, runtime: str, batch_size: int) -> None:
    """Compute by the runtime; where ``auto`` took one that cannot run the model, by torch, as an extraction does."""
    try:
        backbone.use_runtime(runtime, batch_size, workers(backbone.device))
    except RuntimeConversionError:
        if runtime != "auto":
            raise


@contextmanager
def _readers(config: ExtractionConfig, device: torch.device, batch_size: int) -> Iterator[tuple[Ring, Readers]]:
    """A ring and readers as an extraction has them."""
    ring = Ring(RingShape(ring_slots(device), batch_size, config.recipe.tile_px, reading_threads(available_cores())))
    readers: Readers = ReaderProcess(ring, config.reading.limits) if config.reading.isolation else LocalReaders(ring)
    try:
        yield ring, readers
    finally:
        readers.close()
        ring.close()


def _jobs(
    config: ExtractionConfig, samples: Sequence[Sample], columns: Sequence[Column], clock: _Clock
) -> Iterator[SlideJob]:
    """The sampled tiles, again and again until the time is up."""
    for sample in cycle(samples):
        for mpp in dict.fromkeys(column.backbone.recipe.context_mpp for column in columns):
            if clock.enough():
                return
            plan, coords = recorded_plan(sample.record), sample.coords
            if mpp is not None:
                plan, coords = context_tiles(sample.record, coords, mpp)
            alike = tuple(column for column in columns if column.backbone.recipe.context_mpp == mpp)
            recipes = [column.backbone.recipe for column in alike]
            yield SlideJob(
                sample.source.slide_id,
                sample.source.path,
                coords,
                plan,
                alike,
                tuple(np.zeros((len(coords), recipe.dim), recipe.dtype) for recipe in recipes),
                reader=config.reading.reader,
                quality=config.recipe.quality if mpp is None else None,
            )
