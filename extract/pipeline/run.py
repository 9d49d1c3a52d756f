"""One extraction at work: slides prepared ahead, streamed, written."""

import shutil
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import numpy as np

from extract.backbones.backbone import Backbone
from extract.backbones.runtimes import CheckedForward
from extract.errors import (
    ExtractError,
    ReaderError,
    RuntimeConversionError,
    SlideClaimedError,
    SlideUnreadableError,
    StoreFullError,
)
from extract.pipeline.claims import Claims
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
from extract.pipeline.parity import find_parity
from extract.pipeline.preparation import Preparation, PreparedSlide, StoppedError
from extract.pipeline.report import ExtractionReport, Progress, SlideOutcome, tell
from extract.pipeline.stream import Stream
from extract.reading.isolation import ReaderProcess, kill_readers
from extract.reading.readers import LocalReaders, Readers, reading_threads
from extract.reading.ring import INVALID, Ring, RingShape
from extract.signals import stopping
from extract.slides.finding.source import SlideSource
from extract.store import Store, difference, to_dict
from extract.store.core.draft import LEASE_S
from extract.store.core.remote_path import local_path
from extract.tiling.quality import PEN, flagged_rows

_PREPARED_AHEAD = 4
_LOOK_S = 0.2

_METADATA = {"zarr.json", "tessera.json", "entry.json"}
"""Files of a store in which there is no slide yet."""


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
        self._slides: dict[str, PreparedSlide] = {}
        self._outcomes: list[SlideOutcome] = []
        self._elsewhere: list[SlideSource] = []
        self._claims = Claims(store, self._executions)
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
        tell(self._progress, "comparing runtimes" if runtime == "auto" else f"preparing {runtime}")
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
        tell(self._progress, "starting the readers")
        self._progress.start(len(sources))
        cores = available_cores()
        tile_px = self._store.tile_recipe.tile_px
        ring = Ring(RingShape(ring_slots(self._device), self._batch_size, tile_px, reading_threads(cores)))
        readers: Readers = ReaderProcess(ring, self._reading.limits) if self._reading.isolation else LocalReaders(ring)
        stream = Stream(ring, readers, self._device, self._write, self._tiles_done, self._stop.is_set)
        self._stats, warn = stream.stats, self._progress.warn
        preparation = Preparation(self._store, self._columns, self._reading, readers, self._claims, self._stop, warn)
        try:
            self._check_executions(sources)
            with stopping(self._stop, kill_readers), self._claims.kept():
                stream.run(self._jobs(preparation, sources))
        finally:
            readers.close()
            ring.close()
            self._claims.release_all()
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
            execution = self._executions[column.entry]
            parity = find_parity(self._store, sources, column, execution, self._reading.default_mpp)
            if parity is None:
                continue
            then = self._store[parity.slide_id].feature_record(column.entry)["execution"]
            changes = difference(then, to_dict(execution))
            self._log.append({"parity": {"entry": column.entry, **asdict(parity), "changes": changes}})
            self._progress.warn(
                f"entry {column.entry} was begun otherwise ({'; '.join(changes)}); the mean cosine of {parity.tiles} "
                f"tiles computed both ways is {parity.mean:.6f}, the smallest {parity.least:.6f}"
            )

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

    def _jobs(self, preparation: Preparation, sources: Sequence[SlideSource]) -> Iterator[SlideJob | None]:
        """Open and cut slides a few ahead of the stream, in order; those that others are at work on come last."""
        yield from self._prepared(preparation, sources, last_try=False)
        if self._elsewhere and not self._stop.is_set():
            # two runs that wait for each other must not hold back their own slides
            yield None
            self._await_others()
            others, self._elsewhere = self._elsewhere, []
            yield from self._prepared(preparation, others, last_try=True)

    def _prepared(self, preparation: Preparation, sources: Sequence[SlideSource], last_try: bool) -> Iterator[SlideJob]:
        waiting: deque[tuple[SlideSource, float, Future[list[SlideJob]]]] = deque()
        remaining = iter(sources)
        with ThreadPoolExecutor(2, "prepare") as pool:
            while not self._stop.is_set():
                while len(waiting) < _PREPARED_AHEAD and (source := next(remaining, None)) is not None:
                    waiting.append((source, time.monotonic(), pool.submit(self._prepare, preparation, source)))
                if not waiting:
                    return
                source, started, future = waiting.popleft()
                yield from self._settle(source, started, future, last_try)

    def _prepare(self, preparation: Preparation, source: SlideSource) -> list[SlideJob]:
        """The jobs of a slide, which is one of the run from now on; none if it is complete."""
        slide, jobs = preparation.prepare(source)
        if jobs:
            self._slides[source.slide_id] = slide
        else:
            self._note_complete(source)
        return jobs

    def _settle(
        self, source: SlideSource, started: float, future: "Future[list[SlideJob]]", last_try: bool
    ) -> list[SlideJob]:
        """The prepared jobs, or none after noting why."""
        try:
            return future.result()
        except (StoreFullError, StoppedError):
            if not self._stop.is_set():
                raise
        except SlideClaimedError as error:
            if last_try:
                self._note(source, "elsewhere", str(error), seconds=time.monotonic() - started)
            else:
                self._elsewhere.append(source)
        except Exception as error:  # noqa: BLE001  one slide's surprise must not cost the others; the log has it all
            self._note(source, "failed", *_reason(error), seconds=time.monotonic() - started)
        return []

    def _await_others(self) -> None:
        """Wait until the slides of others are done, or their workers show that they live, or their leases end."""
        self._progress.warn(f"{len(self._elsewhere)} slides are left to other processes that are at work on them")
        deadline = time.monotonic() + LEASE_S + 1
        entries = [column.entry for column in self._columns]
        while time.monotonic() < deadline and not self._stop.is_set():
            time.sleep(_LOOK_S)
            units = [(source.slide_id, entry) for source in self._elsewhere for entry in entries]
            if all(self._store.has_features(*unit) or not self._store.is_claimed(*unit) for unit in units):
                return

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
                    f"got slide {job.slide_id!r} with no readable tile among {len(job.coords)} ({job.damage}) → the "
                    f"file is damaged, or of a kind that is not read → copy it again, or convert it"
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
            draft = self._claims.take(job.slide_id, entry)
            if isinstance(failure, OSError) or isinstance(getattr(failure, "__cause__", None), OSError):
                # the file or its disk may be better the next time: the rows stay
                job.save()
                draft.release()
            else:
                draft.discard()
        if job.quality is not None:
            slide.flags, slide.read_by, slide.damage = job.flags, job.read_by, job.damage
        slide.jobs_left -= 1
        if slide.jobs_left == 0:
            self._finish(self._slides.pop(job.slide_id))

    def _finish(self, slide: PreparedSlide) -> None:
        """Account for a slide whose last job is written."""
        rows, n_invalid = flagged_rows(slide.flags), int(np.count_nonzero(slide.flags & INVALID))
        slide.error = slide.error or self._too_many_invalid(slide.source, n_invalid, slide.n_tiles, slide.damage)
        self._note(
            slide.source,
            "embedded" if slide.error is None else "failed",
            *(("", "") if slide.error is None else _reason(slide.error)),
            n_tiles=slide.n_tiles,
            n_invalid=n_invalid,
            n_resumed=slide.n_resumed,
            flagged={name: len(found) for name, found in rows.items() if found},
            reader=slide.read_by,
            seconds=time.monotonic() - slide.started,
        )

    def _note_complete(self, source: SlideSource) -> None:
        for column in self._columns:
            self._store.clear_draft(source.slide_id, column.entry)
        record = self._store[source.slide_id].feature_record(self._columns[0].entry)
        n_tiles, n_invalid = int(record["n_tiles"]), len(record["invalid_rows"])
        error = self._too_many_invalid(source, n_invalid, n_tiles)
        outcome = ("complete",) if error is None else ("failed", str(error))
        self._note(source, *outcome, n_tiles=n_tiles, n_invalid=n_invalid)

    def _too_many_invalid(
        self, source: SlideSource, n_invalid: int, n_tiles: int, damage: str = ""
    ) -> SlideUnreadableError | None:
        """What is wrong with a slide of which a larger part than is permitted cannot be decoded."""
        if n_invalid <= self._reading.max_invalid * n_tiles:
            return None
        why = f" ({damage})" if damage else ""
        return SlideUnreadableError(
            f"got {n_invalid} of {n_tiles} tiles of slide {source.slide_id!r} that cannot be decoded{why} → at most "
            f"{self._reading.max_invalid:.0%} may be → copy the file again and "
            f"run the same command: these tiles are tried again; the others are stored, and --max-invalid takes more"
        )

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
        path, log = local_path(self._store.path), local_path(self._log.path)
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


def _reason(error: Exception) -> tuple[str, str]:
    """Why a slide failed, and the traceback where the error is not one that we raise on purpose."""
    if isinstance(error, ReaderError):
        return str(error), error.trace
    if isinstance(error, (ExtractError, OSError)):
        return str(error), ""
    return f"unexpected {type(error).__name__}: {error}", "".join(traceback.format_exception(error))
