"""The extraction stage: slides in, a store of embeddings out, and an account of every slide."""

import math
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from extract.backbones import DEFAULT_BACKBONE, Backbone, load_backbone
from extract.engine import CPU_BATCH_SIZE, GPU_BATCH_SIZE, SlideJob, Stream, StreamStats
from extract.errors import ExtractError, RecipeError, SlideChangedError, SlideUnreadableError, StoreFullError
from extract.slide import Slide
from extract.sources import SlideSource, find_slides
from extract.store import SlideFingerprint, TileRecipe, ZarrStore
from extract.tiles import cut_slide, recorded_plan

_PREPARED_AHEAD = 4


@dataclass(frozen=True)
class SlideOutcome:
    """What became of one slide.

    Attributes:
        slide_id: its id.
        path: the file.
        outcome: ``embedded``, ``complete`` (it was there already) or ``failed``.
        reason: why it failed, and what to do; empty otherwise.
        n_tiles: tiles on tissue, invalid ones included.
        n_invalid: tiles that could not be decoded.
        mpp: µm/px of its tiles, and where the native mpp came from.
        seconds: from opening to commit.
    """

    slide_id: str
    path: str
    outcome: str
    reason: str = ""
    n_tiles: int = 0
    n_invalid: int = 0
    mpp: dict[str, Any] | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class ExtractionReport:
    """What became of a run.

    Attributes:
        store: path of the store.
        entry: the features entry.
        outcomes: one per slide, sorted by id.
        stats: where the time went.
        seconds: wall time of the run.
        log: the run's JSON lines.
    """

    store: Path
    entry: str
    outcomes: tuple[SlideOutcome, ...]
    stats: StreamStats
    seconds: float
    log: Path

    @property
    def failed(self) -> tuple[SlideOutcome, ...]:
        """The slides that failed."""
        return tuple(outcome for outcome in self.outcomes if outcome.outcome == "failed")

    def count(self, outcome: str) -> int:
        """How many slides ended as ``embedded``, ``complete`` or ``failed``."""
        return sum(o.outcome == outcome for o in self.outcomes)


class Progress(Protocol):
    """What a run tells while it goes on; called from several threads."""

    def start(self, n_slides: int) -> None:
        """The run begins."""

    def tiles_done(self, n: int, bottleneck: str) -> None:
        """``n`` more tiles are embedded; ``bottleneck`` is the stage that the others wait for."""

    def slide_done(self, outcome: SlideOutcome) -> None:
        """A slide is finished."""


class Silent:
    """A `Progress` that says nothing."""

    def start(self, n_slides: int) -> None:
        """Nothing."""

    def tiles_done(self, n: int, bottleneck: str) -> None:
        """Nothing."""

    def slide_done(self, outcome: SlideOutcome) -> None:
        """Nothing."""


def run_extraction(
    slides: str | Path | Sequence[str | Path],
    store: str | Path,
    backbone: str | Backbone = DEFAULT_BACKBONE,
    entry: str | None = None,
    recipe: TileRecipe | None = None,
    table: str | Path | None = None,
    default_mpp: float | None = None,
    weights: str | Path | None = None,
    pooling: str = "model",
    dtype: str = "float16",
    device: str = "auto",
    batch_size: int | None = None,
    progress: Progress | None = None,
    **tiling: Any,
) -> ExtractionReport:
    """Embed slides into a store; resumes where an earlier run stopped.

    A slide that fails is reported and does not stop the others. Slides whose features are complete are not read again.

    Args:
        slides: files and folders.
        store: folder of the store; made if absent.
        backbone: a name for `load_backbone`, or a loaded backbone.
        entry: name of the features entry; by default the backbone's name in small letters.
        recipe: the tile recipe; or give its fields as keywords (``mpp=0.5, tile_px=224, ...``).
        table: the slide table, see `extract.sources.find_slides`.
        default_mpp: µm/px of level 0 for slides that name none.
        weights: local weights file of the backbone.
        pooling: see `load_backbone`.
        dtype: dtype of the stored embeddings.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        batch_size: tiles per forward; by default 4 per core on a CPU and 128 on a GPU.
        progress: told of every slide and batch.
        **tiling: fields of `TileRecipe`, when no ``recipe`` is given.

    Raises:
        RecipeError: a setting is out of range.
        RecipeMismatchError: the store or the entry was made by another recipe; the message names the fields.
        StoreFullError: no space left; what was finished is kept.
        SlideTableError: there is no slide, or the table is unusable.
        BackboneError: the backbone cannot be loaded.

    Example:
        >>> report = run_extraction("slides/", "cohort.zarr", mpp=0.5)     # doctest: +SKIP
        >>> report.count("embedded"), [o.reason for o in report.failed]    # doctest: +SKIP
        (1600, [])
    """
    if default_mpp is not None and not (math.isfinite(default_mpp) and default_mpp > 0):
        raise RecipeError(f"got a default mpp of {default_mpp} → expected µm per pixel, such as 0.25 → correct it")
    recipe = recipe or TileRecipe(**tiling)
    sources = find_slides([slides] if isinstance(slides, (str, Path)) else slides, table)
    if isinstance(backbone, str):
        backbone = load_backbone(backbone, weights, pooling, recipe.tile_px, dtype, device)
    run = _Run(ZarrStore.create(Path(store), recipe), backbone, entry, default_mpp, batch_size, progress or Silent())
    return run.embed(sources)


def entry_name(backbone: str) -> str:
    """The default entry of a backbone: its name with everything outside ``[a-z0-9._-]`` replaced by ``-``."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in backbone.lower())
    return kept.strip("._-") or "features"


class _Run:
    """One run: the store it writes, the stream it drives, the account it keeps."""

    def __init__(
        self,
        store: ZarrStore,
        backbone: Backbone,
        entry: str | None,
        default_mpp: float | None,
        batch_size: int | None,
        progress: Progress,
    ) -> None:
        self._store, self._backbone, self._progress = store, backbone, progress
        self._default_mpp = default_mpp
        self._entry = entry or entry_name(backbone.recipe.backbone)
        store.create_entry(self._entry, backbone.recipe)
        default = CPU_BATCH_SIZE if backbone.device.type == "cpu" else GPU_BATCH_SIZE
        self._batch_size = batch_size or self._recorded_batch_size() or default
        self._execution = backbone.execution(self._batch_size)
        self._sources: dict[str, SlideSource] = {}
        self._outcomes: list[SlideOutcome] = []
        self._log = store.start_run()

    def _recorded_batch_size(self) -> int | None:
        """The batch size of the entry's slides on this kind of device: the last bits of a row depend on it."""
        done = next(iter(self._store.slide_ids(self._entry)), None)
        if done is None:
            return None
        execution = self._store[done].feature_record(self._entry)["execution"]
        return int(execution["batch_size"]) if execution["device"] == self._backbone.execution(0).device else None

    def embed(self, sources: Sequence[SlideSource]) -> ExtractionReport:
        """Embed the slides and report."""
        started = time.monotonic()
        self._sources = {source.slide_id: source for source in sources}
        self._progress.start(len(sources))

        def tiles_done(n: int) -> None:
            self._progress.tiles_done(n, stream.stats.bottleneck)

        stream = Stream(self._backbone, self._batch_size, self._write, tiles_done)
        stream.run(self._jobs(sources))
        seconds = time.monotonic() - started
        summary = {
            "run": {
                "seconds": round(seconds, 3),
                "tiles": stream.stats.tiles,
                "bottleneck": stream.stats.bottleneck,
                "read_cpu_s": round(stream.stats.read_cpu_s, 3),
                "backbone_cpu_s": round(stream.stats.backbone_cpu_s, 3),
                "batch_size": self._batch_size,
                "device": self._execution.device,
            }
        }
        self._log.append(summary)
        outcomes = tuple(sorted(self._outcomes, key=lambda outcome: outcome.slide_id))
        return ExtractionReport(self._store.path, self._entry, outcomes, stream.stats, seconds, self._log.path)

    def _jobs(self, sources: Sequence[SlideSource]) -> Iterator[SlideJob]:
        """Open and cut slides a few ahead of the stream, in order."""
        waiting: deque[tuple[SlideSource, float, Future[SlideJob | None]]] = deque()
        remaining = iter(sources)
        with ThreadPoolExecutor(2, "prepare") as pool:
            while True:
                while len(waiting) < _PREPARED_AHEAD and (source := next(remaining, None)) is not None:
                    waiting.append((source, time.monotonic(), pool.submit(self._prepare, source)))
                if not waiting:
                    return
                source, started, future = waiting.popleft()
                job = self._settle(source, started, future)
                if job is not None:
                    yield job

    def _settle(self, source: SlideSource, started: float, future: "Future[SlideJob | None]") -> SlideJob | None:
        """The prepared job, or None after noting why there is none."""
        try:
            return future.result()
        except StoreFullError:
            raise
        except Exception as error:  # noqa: BLE001  one slide's surprise must not cost the others; the log has it all
            self._note(source, "failed", *_reason(error), seconds=time.monotonic() - started)
        return None

    def _prepare(self, source: SlideSource) -> SlideJob | None:
        """Cut the slide if it is not yet cut; None if its features are complete."""
        if source.slide_id in self._store:
            self._check_same(source)
            if self._store.has_features(source.slide_id, self._entry):
                record = self._store[source.slide_id].feature_record(self._entry)
                self._note(source, "complete", n_tiles=record["n_tiles"], n_invalid=len(record["invalid_rows"]))
                return None
        recipe, started = self._store.tile_recipe, time.monotonic()
        slide = Slide(source.path, source.slide_id)
        try:
            if source.slide_id not in self._store:
                self._store.write_tiles(cut_slide(slide, source.slide_id, recipe, source.mpp, self._default_mpp))
            tiles = self._store[source.slide_id]
            plan, coords = recorded_plan(tiles.record), tiles.coords()
        except BaseException:
            slide.close()
            raise
        features = np.zeros((len(coords), self._backbone.recipe.dim), dtype=self._backbone.recipe.dtype)
        return SlideJob(source.slide_id, slide, coords, plan, features, started=started)

    def _check_same(self, source: SlideSource) -> None:
        """The file and its scale must be those that were cut before."""
        if not source.path.exists():
            raise SlideUnreadableError(f"got {source.path} → there is no such file → check the path")
        record = self._store[source.slide_id].record
        now, then = asdict(SlideFingerprint.of(source.path)), record["slide"]
        if now != then:
            raise SlideChangedError(
                f"got a file for slide {source.slide_id!r} ({now['size_bytes']} bytes) unlike the one "
                f"that was cut before "
                f"({then['size_bytes']} bytes) → one id is one file → bring the old file back, or give "
                f"the new one another "
                f"slide_id in the slide table"
            )
        mpp = record["mpp"]
        stated = source.mpp or (self._default_mpp if mpp["source"] == "--default-mpp" else None)
        if stated is not None and stated != mpp["native"]:
            raise SlideChangedError(
                f"got {stated:g} µm/px for slide {source.slide_id!r} → it was cut as {mpp['native']} "
                f"({mpp['source']}) → "
                f"state the same mpp, or extract into another --store"
            )

    def _write(self, job: SlideJob) -> None:
        """Commit one slide's features; called from the writer thread."""
        source, seconds = self._sources[job.slide_id], time.monotonic() - job.started
        n_tiles, n_invalid = len(job.coords), len(job.invalid_rows)
        try:
            if job.error is not None:
                raise job.error
            if n_invalid == n_tiles:
                raise SlideUnreadableError(
                    f"got slide {job.slide_id!r} with no readable tile among {n_tiles} → the file is "
                    f"damaged → copy it again"
                )
            self._store.write_features(self._entry, job.slide_id, job.features, job.invalid_rows, self._execution)
        except StoreFullError:
            raise
        except Exception as error:  # noqa: BLE001  noted with its traceback where it is not one of ours
            self._note(source, "failed", *_reason(error), n_tiles=n_tiles, n_invalid=n_invalid, seconds=seconds)
        else:
            self._note(source, "embedded", n_tiles=n_tiles, n_invalid=n_invalid, seconds=seconds)

    def _note(
        self,
        source: SlideSource,
        outcome: str,
        reason: str = "",
        trace: str = "",
        *,
        n_tiles: int = 0,
        n_invalid: int = 0,
        seconds: float = 0.0,
    ) -> None:
        mpp = None
        # a record that is damaged may be the very reason
        with suppress(ExtractError, LookupError):
            mpp = dict(self._store[source.slide_id].record["mpp"])
        path = str(source.path)
        noted = SlideOutcome(source.slide_id, path, outcome, reason, n_tiles, n_invalid, mpp, round(seconds, 3))
        self._outcomes.append(noted)
        self._log.append(asdict(noted) | ({"traceback": trace} if trace else {}))
        self._progress.slide_done(noted)


def _reason(error: Exception) -> tuple[str, str]:
    """Why a slide failed, and the traceback where the error is not one that we raise on purpose."""
    if isinstance(error, (ExtractError, OSError)):
        return str(error), ""
    return f"unexpected {type(error).__name__}: {error}", "".join(traceback.format_exception(error))
