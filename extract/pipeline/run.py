"""One extraction at work: slides prepared ahead, streamed, written."""

import os
import shutil
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from types import FrameType
from typing import Any

import numpy as np

from extract.backbones.backbone import Backbone
from extract.backbones.runtimes import CheckedForward
from extract.errors import (
    ExtractError,
    ReaderError,
    RuntimeConversionError,
    SlideClaimedError,
    SlideError,
    SlideUnreadableError,
    StoreFullError,
)
from extract.geometry import ReadPlan
from extract.pipeline.config import ExtractionConfig
from extract.pipeline.jobs import (
    CPU_BATCH_SIZE,
    GPU_BATCH_SIZE,
    Column,
    SlideJob,
    StreamStats,
    available_cores,
    ring_slots,
    workers,
)
from extract.pipeline.parity import Parity, measure_parity
from extract.pipeline.report import ExtractionReport, Progress, SlideOutcome
from extract.pipeline.sameness import check_same
from extract.pipeline.stream import Stream
from extract.reading.answers import rebuild_error
from extract.reading.isolation import ReaderProcess
from extract.reading.reader import cut_request
from extract.reading.readers import LocalReaders, Readers, reading_threads
from extract.reading.ring import INVALID, Ring, RingShape
from extract.slides.source import SlideSource
from extract.store import SlideReader, Store, TileRecipe, TilesUnit, difference, fingerprint, to_dict
from extract.store.core.draft import LEASE_S, Draft
from extract.tiling.pen import is_dark_field
from extract.tiling.quality import PEN, flagged_rows
from extract.tiling.tiles import context_tiles, recorded_plan

_PREPARED_AHEAD = 4
_LOOK_S = 0.2
_EXECUTIONS_LOOKED_AT = 64

_METADATA = {"zarr.json", "tessera.json", "entry.json"}
"""Files of a store in which there is no slide yet."""


@dataclass
class _Slide:
    """One slide of the run: its open drafts, its jobs that are not written yet, and what went wrong."""

    source: SlideSource
    started: float = field(default_factory=time.monotonic)
    jobs_left: int = 0
    n_tiles: int = 0
    n_resumed: int = 0
    dark: bool = False
    flags: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint8))
    read_by: str = ""
    error: Exception | None = None


class ExtractionRun:
    """One run: the store it writes, the stream it drives, the account it keeps."""

    def __init__(self, store: Store, columns: Sequence[Column], config: ExtractionConfig, progress: Progress) -> None:
        self._store, self._columns, self._reading, self._progress = store, list(columns), config.reading, progress
        for column in columns:
            store.create_entry(column.entry, column.backbone.recipe)
        self._log = store.start_run()
        # other runs see that this one is at work
        self._log.path.touch()
        self._all_expected = True
        self._device = columns[0].backbone.device
        default = CPU_BATCH_SIZE if self._device.type == "cpu" else GPU_BATCH_SIZE
        self._batch_size = config.compute.batch_size or self._recorded_batch_size() or default
        self._checked = self._choose_runtime(config.compute.runtime)
        self._executions = {column.entry: column.backbone.execution(self._batch_size) for column in columns}
        self._slides: dict[str, _Slide] = {}
        self._outcomes: list[SlideOutcome] = []
        self._claimed: list[SlideSource] = []
        self._drafts: dict[tuple[str, str], Draft] = {}
        self._stop = threading.Event()

    def _choose_runtime(self, runtime: str) -> list[CheckedForward]:
        """Let every model compute by the runtime; columns of one model share what was compiled."""
        first: dict[int, Backbone] = {}
        checked = []
        for column in self._columns:
            backbone = column.backbone
            known = first.setdefault(id(backbone.module), backbone)
            if known is not backbone:
                backbone.share(known)
            elif (forward := self._use_runtime(backbone, runtime)) is not None:
                checked.append(forward)
        return checked

    def _use_runtime(self, backbone: Backbone, runtime: str) -> CheckedForward | None:
        try:
            return backbone.use_runtime(runtime, self._batch_size, workers(self._device))
        except RuntimeConversionError as error:
            if runtime != "auto":
                raise
            self._progress.warn(f"{error}; torch it is")
            return None

    def _recorded_batch_size(self) -> int | None:
        """The batch size of the entry's slides on this kind of device: the last bits of a row depend on it."""
        entry, backbone = self._columns[0].entry, self._columns[0].backbone
        done = next(iter(self._store.slide_ids(entry)), None)
        if done is None:
            return None
        execution = self._store[done].feature_record(entry)["execution"]
        return int(execution["batch_size"]) if execution["device"] == backbone.execution(0).device else None

    def embed(self, sources: Sequence[SlideSource]) -> ExtractionReport:
        """Embed the slides and report."""
        started = time.monotonic()
        self._progress.start(len(sources))
        cores = available_cores()
        tile_px = self._store.tile_recipe.tile_px
        ring = Ring(RingShape(ring_slots(self._device), self._batch_size, tile_px, reading_threads(cores)))
        readers: Readers = ReaderProcess(ring, self._reading.limits) if self._reading.isolation else LocalReaders(ring)
        stream = Stream(ring, readers, self._device, self._write, self._tiles_done, self._stop.is_set)
        self._readers, self._stats = readers, stream.stats
        try:
            self._check_executions(sources)
            with _stopping(self._stop), self._heartbeat():
                stream.run(self._jobs(sources))
        finally:
            readers.close()
            ring.close()
            for draft in self._drafts.values():
                draft.release()
        if self._stop.is_set():
            self._log.append(
                {"stopped": {"tiles": stream.stats.tiles, "seconds": round(time.monotonic() - started, 3)}}
            )
            raise KeyboardInterrupt
        return self._report(stream.stats, time.monotonic() - started)

    def _check_executions(self, sources: Sequence[SlideSource]) -> None:
        """Where an entry was begun otherwise (another device, precision, version), measure whether that agrees.

        Raises:
            StoreError: it does not.
        """
        for column in self._columns:
            if column.view:
                continue
            now = fingerprint(self._executions[column.entry])
            done = (each for each in sources if self._store.has_features(each.slide_id, column.entry))
            some = islice(done, _EXECUTIONS_LOOKED_AT)
            others = (each for each in some if self._was_made_otherwise(each, column.entry, now))
            parity = next(filter(None, (self._measure_parity(each, column) for each in others)), None)
            if parity is None:
                continue
            then = self._store[parity.slide_id].feature_record(column.entry)["execution"]
            changes = difference(then, to_dict(self._executions[column.entry]))
            self._log.append({"parity": {"entry": column.entry, **asdict(parity), "changes": changes}})
            self._progress.warn(
                f"entry {column.entry} was begun otherwise ({'; '.join(changes)}); the mean cosine of {parity.tiles} "
                f"tiles computed both ways is {parity.mean:.6f}, the smallest {parity.least:.6f}"
            )

    def _measure_parity(self, source: SlideSource, column: Column) -> Parity | None:
        """The comparison on one slide; None if it cannot be read, which is told when its turn comes."""
        try:
            self._check_same(source)
            reader = self._store[source.slide_id]
            return measure_parity(reader, source, column.entry, column.backbone, self._batch_size)
        except (SlideError, OSError):
            return None

    def _was_made_otherwise(self, source: SlideSource, entry: str, execution: str) -> bool:
        record = self._store[source.slide_id].feature_record(entry)
        return record["execution_fingerprint"] != execution and source.path.exists()

    def _report(self, stats: StreamStats, seconds: float) -> ExtractionReport:
        execution = next(iter(self._executions.values()))
        summary = {
            "run": {
                "seconds": round(seconds, 3),
                "tiles": stats.tiles,
                "bottleneck": stats.bottleneck,
                "device_busy": round(stats.device_busy, 4),
                "read_cpu_s": round(stats.read_cpu_s, 3),
                "device_busy_s": round(stats.device_busy_s, 3),
                "waited_for_slides_s": round(stats.waited_for_slides_s, 3),
                "waited_for_tiles_s": round(stats.waited_for_tiles_s / stats.workers, 3),
                "waited_for_backbone_s": round(stats.waited_for_backbone_s, 3),
                "waited_for_writer_s": round(stats.waited_for_writer_s, 3),
                "batch_size": self._batch_size,
                "device": execution.device,
                "runtime": execution.runtime,
                "precision": execution.precision,
                "parity_with_torch": [forward.cosine for forward in self._checked],
                "isolation": self._reading.isolation,
            }
        }
        self._log.append(summary)
        outcomes = tuple(sorted(self._outcomes, key=lambda outcome: outcome.slide_id))
        entries = tuple(column.entry for column in self._columns)
        return ExtractionReport(self._store.path, entries[0], entries, outcomes, stats, seconds, self._log.path)

    def _tiles_done(self, n: int) -> None:
        self._progress.tiles_done(n, self._stats)

    def _jobs(self, sources: Sequence[SlideSource]) -> Iterator[SlideJob | None]:
        """Open and cut slides a few ahead of the stream, in order; those that others are at work on come last."""
        yield from self._prepared(sources, last_try=False)
        if self._claimed and not self._stop.is_set():
            # two runs that wait for each other must not hold back their own slides
            yield None
            self._await_claimed()
            claimed, self._claimed = self._claimed, []
            yield from self._prepared(claimed, last_try=True)

    def _prepared(self, sources: Sequence[SlideSource], last_try: bool) -> Iterator[SlideJob]:
        waiting: deque[tuple[SlideSource, float, Future[list[SlideJob]]]] = deque()
        remaining = iter(sources)
        with ThreadPoolExecutor(2, "prepare") as pool:
            while not self._stop.is_set():
                while len(waiting) < _PREPARED_AHEAD and (source := next(remaining, None)) is not None:
                    waiting.append((source, time.monotonic(), pool.submit(self._prepare, source)))
                if not waiting:
                    return
                source, started, future = waiting.popleft()
                yield from self._settle(source, started, future, last_try)

    def _settle(
        self, source: SlideSource, started: float, future: "Future[list[SlideJob]]", last_try: bool
    ) -> list[SlideJob]:
        """The prepared jobs, or none after noting why."""
        try:
            return future.result()
        except (StoreFullError, _Stopped):
            if not self._stop.is_set():
                raise
        except SlideClaimedError as error:
            if last_try:
                self._note(source, "elsewhere", str(error), seconds=time.monotonic() - started)
            else:
                self._claimed.append(source)
        except Exception as error:  # noqa: BLE001  one slide's surprise must not cost the others; the log has it all
            self._note(source, "failed", *_reason(error), seconds=time.monotonic() - started)
        return []

    def _await_claimed(self) -> None:
        """Wait until the slides of others are done, or their workers show that they live, or their leases end."""
        self._progress.warn(f"{len(self._claimed)} slides are left to other processes that are at work on them")
        deadline = time.monotonic() + LEASE_S + 1
        entries = [column.entry for column in self._columns]
        while time.monotonic() < deadline and not self._stop.is_set():
            time.sleep(_LOOK_S)
            units = [(source.slide_id, entry) for source in self._claimed for entry in entries]
            if all(self._store.has_features(*unit) or not self._store.is_claimed(*unit) for unit in units):
                return

    def _prepare(self, source: SlideSource) -> list[SlideJob]:
        """Cut the slide if it is not yet cut; no job if its features are complete."""
        if source.slide_id in self._store:
            self._check_same(source)
        slide = _Slide(source)
        missing = [c for c in self._columns if not self._store.has_features(source.slide_id, c.entry)]
        if not missing:
            self._note_complete(source)
            return []
        if source.slide_id not in self._store:
            self._store.write_tiles(self._cut(source))
        tiles = self._store[source.slide_id]
        slide.n_tiles = len(tiles.coords())
        slide.dark = self._is_dark(tiles)
        jobs = self._make_jobs(slide, tiles, missing)
        if not jobs:
            self._note_complete(source)
            return []
        slide.jobs_left = len(jobs)
        self._slides[source.slide_id] = slide
        return jobs

    def _is_dark(self, tiles: SlideReader) -> bool:
        """Whether it is a dark-field image, on which there is no ink; the user is told where tissue was looked for."""
        try:
            dark = is_dark_field(tiles.thumbnail, self._store.tile_recipe.quality.pen)
        except ExtractError:
            # its tiles can be embedded without a picture
            return False
        if dark and tiles.record["tissue"]["method"] in ("default", "saturation"):
            self._progress.warn(
                f"slide {tiles.slide_id!r} is nearly all dark: a fluorescence or dark-field image? Tissue is told by "
                f"the colour of stains on light glass; if some is missing, use --tissue none, or give a mask"
            )
        return dark

    def _cut(self, source: SlideSource) -> TilesUnit:
        """Have the readers cut a slide."""
        if not source.path.exists():
            raise SlideUnreadableError(f"got {source.path} → there is no such file → check the path")
        reading = self._reading
        future = self._readers.request(
            cut_request(source, reading.reader, self._store.tile_recipe, reading.default_mpp)
        )
        while not wait([future], _LOOK_S).done:
            # the cut itself cannot be interrupted, but the run can
            if self._stop.is_set():
                raise _Stopped
        answer, arrays = future.result()
        if "error" in answer:
            raise rebuild_error(answer["error"], source.slide_id)
        coords, fraction, thumbnail, *mask = arrays
        unit = TilesUnit(source.slide_id, coords, fraction, thumbnail, answer["record"], *mask)
        _check_unit(unit, self._store.tile_recipe)
        return unit

    def _make_jobs(self, slide: _Slide, tiles: SlideReader, missing: Sequence[Column]) -> list[SlideJob]:
        """One job for the tiles, and one for each context around them; the claims are given back if that fails."""
        slide_id = slide.source.slide_id
        drafts = self._open_drafts(slide.source, missing)
        try:
            # another process may have committed between the look and the claim
            for column in missing:
                if self._store.has_features(slide_id, column.entry):
                    self._drafts.pop((slide_id, column.entry)).discard()
                    drafts.pop(column.entry)
            return self._make_claimed_jobs(slide, tiles, drafts)
        except BaseException:
            for entry in drafts:
                if (draft := self._drafts.pop((slide_id, entry), None)) is not None:
                    draft.release()
            raise

    def _make_claimed_jobs(self, slide: _Slide, tiles: SlideReader, drafts: Mapping[str, Draft]) -> list[SlideJob]:
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

    def _open_drafts(self, source: SlideSource, columns: Sequence[Column]) -> dict[str, Draft]:
        """Claim the slide for every column, or for none."""
        drafts: dict[str, Draft] = {}
        try:
            for column in columns:
                drafts[column.entry] = self._store.draft(column.entry, source.slide_id, self._executions[column.entry])
        except BaseException:
            for draft in drafts.values():
                draft.release()
            raise
        self._drafts |= {(source.slide_id, entry): draft for entry, draft in drafts.items()}
        return drafts

    def _check_same(self, source: SlideSource) -> None:
        if not source.path.exists():
            raise SlideUnreadableError(f"got {source.path} → there is no such file → check the path")
        check_same(source, self._store[source.slide_id].record, self._reading.default_mpp)

    def _write(self, job: SlideJob) -> None:
        """Commit one job's features; called from the writer thread."""
        slide = self._slides[job.slide_id]
        entries = [column.entry for column in job.columns]
        failure: Exception | None = None
        try:
            if job.error is not None:
                raise job.error
            if len(job.invalid_rows) == len(job.coords):
                raise SlideUnreadableError(
                    f"got slide {job.slide_id!r} with no readable tile among {len(job.coords)} → the file is damaged → "
                    f"copy it again"
                )
            if slide.dark:
                job.flags &= np.uint8(~PEN & 0xFF)
            flagged = None if job.quality is None else flagged_rows(job.flags)
            for entry, features in zip(entries, job.features, strict=True):
                execution = self._executions[entry]
                self._store.write_features(entry, job.slide_id, features, job.invalid_rows, execution, flagged)
        except StoreFullError:
            raise
        except Exception as error:  # noqa: BLE001  noted with its traceback where it is not one of ours
            failure = error
            slide.error = slide.error or error
        for entry in entries:
            draft = self._drafts.pop((job.slide_id, entry))
            if isinstance(failure, OSError) or isinstance(getattr(failure, "__cause__", None), OSError):
                # the file or its disk may be better the next time: the rows stay
                job.save()
                draft.release()
            else:
                draft.discard()
        if job.quality is not None:
            slide.flags, slide.read_by = job.flags, job.read_by
        slide.jobs_left -= 1
        if slide.jobs_left == 0:
            self._finish(self._slides.pop(job.slide_id))

    def _finish(self, slide: _Slide) -> None:
        """Account for a slide whose last job is written."""
        rows = flagged_rows(slide.flags)
        self._note(
            slide.source,
            "embedded" if slide.error is None else "failed",
            *(("", "") if slide.error is None else _reason(slide.error)),
            n_tiles=slide.n_tiles,
            n_invalid=int(np.count_nonzero(slide.flags & INVALID)),
            n_resumed=slide.n_resumed,
            flagged={name: len(found) for name, found in rows.items() if found},
            reader=slide.read_by,
            seconds=time.monotonic() - slide.started,
        )

    def _note_complete(self, source: SlideSource) -> None:
        for column in self._columns:
            self._store.clear_draft(source.slide_id, column.entry)
        record = self._store[source.slide_id].feature_record(self._columns[0].entry)
        self._note(source, "complete", n_tiles=record["n_tiles"], n_invalid=len(record["invalid_rows"]))

    def _note(
        self, source: SlideSource, outcome: str, reason: str = "", trace: str = "", seconds: float = 0.0, **facts: Any
    ) -> None:
        mpp = None
        # a record that is damaged may be the very reason
        with suppress(ExtractError, LookupError):
            mpp = dict(self._store[source.slide_id].record["mpp"])
        noted = SlideOutcome(
            source.slide_id, str(source.path), outcome, reason, mpp=mpp, seconds=round(seconds, 3), **facts
        )
        self._outcomes.append(noted)
        self._all_expected &= not trace
        self._log.append(asdict(noted) | ({"traceback": trace} if trace else {}))
        self._progress.slide_done(noted)

    def close_log(self) -> None:
        """End the run's log."""
        self._log.close()

    def write_index(self) -> None:
        """Let the store be listed faster from now on."""
        self._store.write_index()

    def remove_empty_store(self) -> None:
        """Remove a store that this run made and cut nothing into, as where the scale suits no slide.

        It stays where another run is at work in it, or where its log holds the trace of a surprise.
        """
        path, log = self._store.path, self._log.path
        held = {file.name for file in path.rglob("*") if file.is_file() and file != log}
        if not self._all_expected or not held <= _METADATA:
            return
        try:
            log.unlink()
            # refused where there is the log of another run
            log.parent.rmdir()
        except OSError:
            return
        shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def _heartbeat(self) -> Iterator[None]:
        """Keep the leases of this run's drafts."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(LEASE_S / 6):
                for draft in list(self._drafts.values()):
                    draft.touch()

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


class _Stopped(Exception):
    """The run was asked to stop while something was waited for."""


@contextmanager
def _stopping(stop: threading.Event) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM set ``stop``; a second one ends the process, which loses little: rows are saved."""

    def first(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, first) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def _reason(error: Exception) -> tuple[str, str]:
    """Why a slide failed, and the traceback where the error is not one that we raise on purpose."""
    if isinstance(error, ReaderError):
        return str(error), error.trace
    if isinstance(error, (ExtractError, OSError)):
        return str(error), ""
    return f"unexpected {type(error).__name__}: {error}", "".join(traceback.format_exception(error))


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
