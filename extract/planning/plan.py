"""What an extraction will do, before it costs a GPU hour: tiles, disk space, time, and the slides that will fail."""

import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count as count_up
from itertools import cycle
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
import torch

from extract.backbones.backbone import DEFAULT_BACKBONE, Backbone, load_backbone
from extract.backbones.presets import find_preset
from extract.errors import (
    BackboneError,
    ExtractError,
    RecipeError,
    RecipeMismatchError,
    RuntimeConversionError,
    SlideUnreadableError,
    StoreError,
)
from extract.geometry import ReadPlan
from extract.pipeline.extraction import check_contexts, check_same, entry_name, make_columns
from extract.pipeline.stream import (
    CPU_BATCH_SIZE,
    GPU_BATCH_SIZE,
    Column,
    SlideJob,
    Stream,
    available_cores,
    ring_slots,
    workers,
)
from extract.planning.doctor import nearest_folder
from extract.reading.isolation import LocalReaders, ReaderLimits, ReaderProcess, Readers, reading_threads, rebuild_error
from extract.reading.reader import PREPARING_THREADS, cut_request, open_request
from extract.reading.ring import Ring, RingShape
from extract.slides.sources import SlideSource, find_slides, shard
from extract.store import (
    AugmentRecipe,
    Store,
    TileRecipe,
    difference,
    find_format,
    open_store,
)
from extract.store.core.remote_path import RemotePath, store_path
from extract.store.formats.opening import check_format
from extract.tiling.tiles import context_tiles, recorded_plan

_MOST_CUTTERS = 8
_SAMPLED_SLIDES = 8
_SAMPLED_TILES = 4096
_MEASURE_S = 5.0
_GIVE_UP_S = 120.0


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
    """

    slides: tuple[PlannedSlide, ...]
    entries: tuple[PlannedEntry, ...]
    store: Path | None
    free_bytes: int | None
    rate: MeasuredRate | None
    cut_seconds: float
    problems: tuple[str, ...]
    start_seconds: float = 0.0

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
class _Wish:
    """What is asked for, as far as planning a slide and measuring need it."""

    recipe: TileRecipe
    entry: str | None
    views: int
    augment: AugmentRecipe
    context_mpp: tuple[float, ...]
    batch_size: int | None
    runtime: str
    default_mpp: float | None
    reader: str
    isolation: bool
    limits: ReaderLimits


@dataclass(frozen=True)
class _Model:
    """A backbone that is loaded, or of which only the preset is known."""

    name: str
    dim: int
    dtype: str
    backbone: Backbone | None = None
    problem: str = ""

    @classmethod
    def of(cls, backbone: Backbone) -> "_Model":
        """A loaded one."""
        recipe = backbone.recipe
        return cls(recipe.backbone, recipe.dim, recipe.dtype, backbone)

    def entries(self, wish: _Wish) -> list[PlannedEntry]:
        """What it will write; named as `extract.pipeline.extraction.make_columns` names it."""
        name = wish.entry or entry_name(self.name)
        plain = PlannedEntry(name, self.dim, self.dtype)
        views = [replace(plain, name=f"{name}@view-{view}") for view in range(1, wish.views + 1)]
        contexts = [replace(plain, name=f"{name}@context-{mpp:g}", context_mpp=mpp) for mpp in wish.context_mpp]
        return [plain, *views, *contexts]


@dataclass(frozen=True)
class _Sample:
    """Some tiles of a slide, to measure with."""

    source: SlideSource
    record: Mapping[str, Any]
    coords: np.ndarray


def plan_extraction(
    slides: str | Path | Sequence[str | Path],
    store: str | Path | None = None,
    backbone: str | Backbone | Sequence[str | Backbone] = DEFAULT_BACKBONE,
    entry: str | None = None,
    recipe: TileRecipe | None = None,
    table: str | Path | None = None,
    default_mpp: float | None = None,
    weights: str | Path | None = None,
    pooling: str = "model",
    dtype: str = "float16",
    device: str = "auto",
    batch_size: int | None = None,
    progress: PlanProgress | None = None,
    *,
    masks: str | Path | None = None,
    images: str | None = None,
    shard_text: str | None = None,
    views: int = 0,
    augment: AugmentRecipe | None = None,
    context_mpp: Sequence[float] = (),
    runtime: str = "auto",
    precision: str = "auto",
    compile_model: bool = False,
    allow_remote_code: bool = False,
    reader: str = "auto",
    isolation: bool = True,
    limits: ReaderLimits | None = None,
    format: str | None = None,
    measure: bool = True,
    measure_s: float = _MEASURE_S,
    **tiling: Any,
) -> ExtractionPlan:
    """Find out what `extract.pipeline.extraction.run_extraction` will do with the same arguments; writes nothing.

    Slides are opened and cut as an extraction does it, in reading processes of their own.

    Args:
        slides: files and folders.
        store: folder of the store; slides that are complete in it are not planned again.
        measure: whether tiles of the first slides are embedded to measure the rate.
        measure_s: seconds to measure for, after a warm-up.
        **tiling: fields of `TileRecipe`, when no ``recipe`` is given. All other arguments are those of
            `extract.pipeline.extraction.run_extraction`.

    Raises:
        RecipeError: a setting is out of range.
        RecipeMismatchError: the store or the entry was made by another recipe; the message names the fields.
        StoreError: the store is of another format, or its path is something else.
        SlideTableError: there is no slide, or the table is unusable.
        BackboneError: there is no such backbone. Weights that are not to be had are one of the plan's ``problems``.

    Example:
        >>> plan = plan_extraction("slides/", mpp=0.5)                       # doctest: +SKIP
        >>> plan.n_tiles, plan.cache_bytes, [s.reason for s in plan.failed]  # doctest: +SKIP
        (1200345, 3072883200, [])
    """
    if default_mpp is not None and not (math.isfinite(default_mpp) and default_mpp > 0):
        raise RecipeError(f"got a default mpp of {default_mpp} → expected µm per pixel, such as 0.25 → correct it")
    if store is not None:
        check_format(store, format)
    recipe = recipe or TileRecipe(**tiling)
    check_contexts(recipe, context_mpp)
    sources = find_slides([slides] if isinstance(slides, (str, Path)) else slides, table, masks, images)
    if shard_text is not None:
        sources = shard(sources, shard_text)
    wish = _Wish(
        recipe,
        entry,
        views,
        augment or AugmentRecipe(),
        tuple(context_mpp),
        batch_size,
        runtime,
        default_mpp,
        reader,
        isolation,
        limits or ReaderLimits(),
    )
    load = partial(
        load_backbone,
        weights=weights,
        pooling=pooling,
        tile_px=recipe.tile_px,
        dtype=dtype,
        device=device,
        precision=precision,
        compile=compile_model,
        allow_remote_code=allow_remote_code,
    )
    given, began = [backbone] if isinstance(backbone, (str, Backbone)) else backbone, time.monotonic()
    models = [_find_model(each, load, None if measure else pooling, dtype) for each in given]
    loaded_s = time.monotonic() - began
    plan = _plan(sources, wish, models, None if store is None else store_path(store), measure, measure_s, progress)
    return replace(plan, start_seconds=plan.start_seconds + loaded_s)


def _plan(
    sources: Sequence[SlideSource],
    wish: _Wish,
    models: Sequence[_Model],
    store: Path | None,
    measure: bool,
    measure_s: float,
    progress: PlanProgress | None,
) -> ExtractionPlan:
    """Plan every slide, then measure."""
    progress = progress or SilentPlan()
    entries = [entry for model in models for entry in model.entries(wish)]
    there = None if store is None else _open_existing(store, wish.recipe)
    if there is not None:
        _check_entries(there, wish, models)
    planner = _Planner(wish, entries, there)
    slides, samples = planner.plan(sources, progress)
    problems = [model.problem for model in models if model.problem]
    rate, start_s = None, 0.0
    if measure and samples and not problems:
        rate, start_s, problem = _measure(wish, models, samples, measure_s, progress)
        problems += [problem] if problem else []
    free = None if store is None or isinstance(store, RemotePath) else shutil.disk_usage(nearest_folder(store)).free
    plan = ExtractionPlan(slides, tuple(entries), store, free, rate, planner.cut_seconds, tuple(problems), start_s)
    if free is not None and free < plan.cache_bytes:
        full = (
            f"got {free / 1e9:.1f} GB of free space for {store} → the embeddings need {plan.cache_bytes / 1e9:.1f} GB "
            f"→ free some space, or move the --store"
        )
        return replace(plan, problems=(*plan.problems, full))
    return plan


def _find_model(
    given: str | Backbone, load: Callable[[str], Backbone], preset_pooling: str | None, dtype: str
) -> _Model:
    """The backbone, loaded; or what its preset declares, where that is enough or all that can be had.

    Args:
        given: a name, or a loaded backbone.
        load: loads one by its name.
        preset_pooling: the pooling whose declared size is enough; None where the backbone is needed itself.
        dtype: of the stored embeddings.
    """
    if isinstance(given, Backbone):
        return _Model.of(given)
    preset = find_preset(given)
    if preset is None:
        return _Model.of(load(given))
    if preset_pooling is not None:
        dim = preset.dim if preset_pooling == "model" else preset.dims.get(preset_pooling)
        if dim is not None:
            return _Model(preset.name, dim, dtype)
    try:
        return _Model.of(load(given))
    except BackboneError as error:
        # the slides can be planned without its weights, and the user learns all at once
        return _Model(preset.name, preset.dim, dtype, problem=str(error))


def _open_existing(path: Path, recipe: TileRecipe) -> Store | None:
    """The store if it is there; an extraction would refuse it for the same reasons."""
    if find_format(path) is None:
        if path.exists() and (not path.is_dir() or any(not each.name.startswith("~") for each in path.iterdir())):
            raise StoreError(f"got {path} as store → it exists and is not a store → choose another --store")
        return None
    store = open_store(path)
    changes = difference(store.tile_recipe, recipe)
    if changes and len(store):
        raise RecipeMismatchError(
            f"got a tile recipe unlike that of store {path} (there → now): {'; '.join(changes)} → one store holds one "
            f"recipe → repeat the settings of the store, or choose another --store"
        )
    return store


def _check_entries(store: Store, wish: _Wish, models: Sequence[_Model]) -> None:
    """Entries that are there must have been made by the same recipe."""
    columns = [column for model in models if model.backbone is not None for column in _columns(wish, model.backbone)]
    for column in columns:
        if column.entry not in store.entries():
            continue
        if changes := difference(store.feature_recipe(column.entry), column.backbone.recipe):
            raise RecipeMismatchError(
                f"got a feature recipe unlike that of entry {column.entry!r} in {store.path} (there → now): "
                f"{'; '.join(changes)} → one entry holds one recipe → name another entry with --as, or repeat the "
                f"settings"
            )


def _columns(wish: _Wish, backbone: Backbone) -> list[Column]:
    return make_columns(backbone, wish.entry, wish.views, wish.augment, wish.context_mpp)


# ---------------------------------------------------------------- slides


class _Cutters:
    """Reading processes, as many as the cores allow; ``n`` threads at once may ask them for a slide."""

    def __init__(self, wish: _Wish, n_slides: int) -> None:
        count = min(_MOST_CUTTERS, max(available_cores() // PREPARING_THREADS, 1), -(-n_slides // PREPARING_THREADS))
        # one slot and one reading thread for each slide that is looked at
        shape = RingShape(PREPARING_THREADS, 1, wish.recipe.tile_px, 2 * PREPARING_THREADS)
        self._rings = [Ring(shape) for _ in range(count if wish.isolation else 1)]
        self._readers: list[Readers] = [
            ReaderProcess(ring, wish.limits) if wish.isolation else LocalReaders(ring) for ring in self._rings
        ]
        # a slide waits here and not in a process, whose limit of time begins when it takes the slide up
        self._seats: SimpleQueue[tuple[Readers, int]] = SimpleQueue()
        for slot in range(PREPARING_THREADS):
            for readers in self._readers:
                self._seats.put((readers, slot))
        self._keys = count_up(1)
        self.n = PREPARING_THREADS * len(self._readers)

    @contextmanager
    def seat(self) -> Iterator[tuple[Readers, int]]:
        """A process that has time for a slide, and the slot for its tile."""
        seat = self._seats.get()
        try:
            yield seat
        finally:
            self._seats.put(seat)

    def cut(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], list[np.ndarray], float]:
        """The answer to a request, its arrays, and how long it took."""
        with self.seat() as (readers, _):
            started = time.monotonic()
            answer, arrays = readers.request(request).result()
            return answer, arrays, time.monotonic() - started

    def try_tile(
        self, source: SlideSource, reader: str, plan: ReadPlan, coords: np.ndarray
    ) -> tuple[dict[str, str], dict[str, str]]:
        """Read one tile, as every extraction will.

        Returns:
            How the slide is read (``reader`` and ``note``), and the error that ends it; both as the reader describes
            them, the second one usually empty.
        """
        key = next(self._keys)
        with self.seat() as (readers, slot):
            readers.tell(open_request(key, source.path, source.slide_id, reader, plan, None), [coords])
            try:
                answer, _ = readers.request({"do": "read", "slot": slot, "at": 0, "runs": [[key, 0, 1]]}).result()
            finally:
                readers.tell({"do": "close", "key": key})
        error = answer.get("error") or answer["errors"].get(str(key), {})
        return answer.get("opened", {}).get(str(key), {}), error

    def close(self) -> None:
        """End the processes."""
        for readers in self._readers:
            readers.close()
        for ring in self._rings:
            ring.close()


class _Planner:
    """Cuts every slide and keeps the account."""

    def __init__(self, wish: _Wish, entries: Sequence[PlannedEntry], store: Store | None) -> None:
        self._wish, self._entries, self._store = wish, entries, store
        there = set() if store is None else set(store.entries())
        self._done = {
            entry.name: set(store.slide_ids(entry.name)) if store is not None and entry.name in there else set()
            for entry in entries
        }
        self._cut_s = 0.0
        self._lock = threading.Lock()

    @property
    def cut_seconds(self) -> float:
        """How long an extraction will take to cut the slides that the store has not."""
        return self._cut_s / PREPARING_THREADS

    def plan(
        self, sources: Sequence[SlideSource], progress: PlanProgress
    ) -> tuple[tuple[PlannedSlide, ...], list[_Sample]]:
        """Plan every slide; and some tiles of the first ones."""
        progress.start(len(sources))
        slides: list[PlannedSlide] = []
        samples: list[_Sample] = []
        cutters = _Cutters(self._wish, len(sources))
        pool = ThreadPoolExecutor(cutters.n, "plan")
        try:
            for slide, sample in pool.map(lambda source: self._plan_guarded(source, cutters), sources):
                slides.append(slide)
                if sample is not None and len(samples) < _SAMPLED_SLIDES:
                    samples.append(sample)
                progress.slide_done(slide)
        finally:
            # after Ctrl-C: what waits is dropped, and closing the readers ends what is being cut
            pool.shutdown(wait=False, cancel_futures=True)
            cutters.close()
        return tuple(slides), samples

    def _plan_guarded(self, source: SlideSource, cutters: _Cutters) -> tuple[PlannedSlide, _Sample | None]:
        try:
            return self._plan_slide(source, cutters)
        except (ExtractError, OSError) as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001  one slide's surprise must not cost the others
            reason = f"unexpected {type(error).__name__}: {error}"
        return PlannedSlide(source.slide_id, str(source.path), "fail", reason), None

    def _plan_slide(self, source: SlideSource, cutters: _Cutters) -> tuple[PlannedSlide, _Sample | None]:
        if not source.path.exists():
            raise SlideUnreadableError(f"got {source.path} → there is no such file → check the path")
        if self._store is not None and source.slide_id in self._store:
            there = self._store[source.slide_id]
            record, coords = there.record, there.coords()
            check_same(source, record, self._wish.default_mpp)
        else:
            record, coords = self._cut(source, cutters)
        for mpp in self._wish.context_mpp:
            context_tiles(record, coords, mpp)
        missing = [entry for entry in self._entries if source.slide_id not in self._done[entry.name]]
        facts = _facts(record) | {"n_tiles": len(coords)}
        if not missing:
            return PlannedSlide(source.slide_id, str(source.path), "complete", **facts), None
        sample = _Sample(source, record, _middle(coords))
        opened, error = cutters.try_tile(source, self._wish.reader, recorded_plan(record), sample.coords[:1])
        if error:
            raise rebuild_error(error, source.slide_id)
        facts["n_bytes"] = len(coords) * sum(entry.tile_bytes for entry in missing)
        facts |= {"reader": opened.get("reader", ""), "reader_note": opened.get("note", "")}
        return PlannedSlide(source.slide_id, str(source.path), "embed", **facts), sample

    def _cut(self, source: SlideSource, cutters: _Cutters) -> tuple[dict[str, Any], np.ndarray]:
        """Have a reading process cut a slide, by the request that an extraction makes; its record and coordinates."""
        request = cut_request(source, self._wish.reader, self._wish.recipe, self._wish.default_mpp)
        answer, arrays, seconds = cutters.cut(request)
        if "error" in answer:
            raise rebuild_error(answer["error"], source.slide_id)
        with self._lock:
            self._cut_s += seconds
        return dict(answer["record"]) | {"slide_id": source.slide_id}, arrays[0]


def _facts(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the record of a tiles unit says of scale and tissue."""
    plan = recorded_plan(record)
    return {
        "native_mpp": plan.native_mpp,
        "mpp_source": record["mpp"]["source"],
        "achieved_mpp": plan.achieved_mpp,
        "level": plan.level,
        "downsample": plan.downsample,
        "resampled": plan.resampled,
        "tissue_mm2": record["tissue"]["area_mm2"],
    }


def _middle(coords: np.ndarray) -> np.ndarray:
    """At most `_SAMPLED_TILES` consecutive tiles from the middle of a slide."""
    first = max(len(coords) - _SAMPLED_TILES, 0) // 2
    return np.array(coords[first : first + _SAMPLED_TILES])


# ---------------------------------------------------------------- rate


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


def _measure(
    wish: _Wish, models: Sequence[_Model], samples: Sequence[_Sample], seconds: float, progress: PlanProgress
) -> tuple[MeasuredRate | None, float, str]:
    """Embed sampled tiles through the ordinary stream; the rate, seconds to the first batch, or why there is none."""
    began = time.monotonic()
    backbones = [model.backbone for model in models if model.backbone is not None]
    device = backbones[0].device
    size = wish.batch_size or (CPU_BATCH_SIZE if device.type == "cpu" else GPU_BATCH_SIZE)
    try:
        for backbone in backbones:
            _use_runtime(backbone, wish.runtime, size)
    except ExtractError as error:
        return None, 0.0, str(error)
    columns = [column for backbone in backbones for column in _columns(wish, backbone)]
    execution = backbones[0].execution(size)
    where = f"{execution.device} ({execution.precision}, {execution.runtime}, batch size {size})"
    progress.measuring(where)
    clock, started = _Clock(2 * workers(device), seconds), time.monotonic()
    errors: list[Exception | None] = []
    with _readers(wish, device, size) as (ring, readers):
        stream = Stream(ring, readers, device, lambda job: errors.append(job.error), clock.tiles_done, clock.enough)
        try:
            stream.run(_jobs(wish, samples, columns, clock))
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
def _readers(wish: _Wish, device: torch.device, batch_size: int) -> Iterator[tuple[Ring, Readers]]:
    """A ring and readers as an extraction has them."""
    ring = Ring(RingShape(ring_slots(device), batch_size, wish.recipe.tile_px, reading_threads(available_cores())))
    readers: Readers = ReaderProcess(ring, wish.limits) if wish.isolation else LocalReaders(ring)
    try:
        yield ring, readers
    finally:
        readers.close()
        ring.close()


def _jobs(wish: _Wish, samples: Sequence[_Sample], columns: Sequence[Column], clock: _Clock) -> Iterator[SlideJob]:
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
                reader=wish.reader,
                quality=wish.recipe.quality if mpp is None else None,
            )
