"""The stream: tiles of many slides → fixed-size batches → backbone → one matrix per slide.

Batches run across slides, so that the device never waits for a slide to end, and each has the same size, so that a row
does not depend on how the run was cut. On a CPU every core runs whole batches with one thread each, which wastes
nothing on waiting inside operators; on a GPU one thread feeds the device while the others read.
"""

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from extract.backbones import Backbone, to_dtype
from extract.errors import FeatureRangeError, TileDecodeError
from extract.geometry import ReadPlan
from extract.slide import Slide

CPU_BATCH_SIZE = 4
GPU_BATCH_SIZE = 128

# option numbers of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks of up to 32 MiB for the next forward, 256 MiB in all, instead of unmapping them.

    By default every intermediate of a forward is mapped and unmapped, and since threads share one address space they
    queue for it: two cores embedded 35 tiles/s instead of 104. Holds for the process; does nothing without glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for option, value in ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 256 << 20), (_M_TOP_PAD, 16 << 20)):
        mallopt(option, value)


@dataclass
class SlideJob:
    """One slide on its way through the stream.

    Attributes:
        slide_id: its id.
        slide: the open slide; closed when the last row is in.
        coords: int32 [n, 2] in level-0 px.
        plan: how its tiles are read.
        features: [n, dim] in the dtype of the store, filled as batches finish.
        invalid_rows: rows whose tile could not be decoded.
        error: what ended the slide early, if anything did; the other slides go on.
        started: monotonic seconds.
    """

    slide_id: str
    slide: Slide
    coords: np.ndarray
    plan: ReadPlan
    features: np.ndarray
    invalid_rows: list[int] = field(default_factory=list)
    error: Exception | None = None
    started: float = field(default_factory=time.monotonic)
    rows_left: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.rows_left = len(self.coords)


@dataclass
class StreamStats:
    """Where the time went, in seconds summed over threads; ``tiles`` counts finished rows."""

    tiles: int = 0
    read_cpu_s: float = 0.0
    backbone_cpu_s: float = 0.0
    waited_for_tiles_s: float = 0.0
    waited_for_backbone_s: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def bottleneck(self) -> str:
        """``reading`` when the backbone waits for tiles longer than tiles wait for the backbone."""
        return "reading" if self.waited_for_tiles_s > self.waited_for_backbone_s else "backbone"


Row = tuple[SlideJob, int]


def _store_row(job: SlideJob, row: int, features: np.ndarray) -> None:
    """Put one embedding in its place; a value that the store cannot hold ends the slide at once."""
    if job.error is None:
        try:
            job.features[row] = to_dtype(features, job.features.dtype.name, job.slide_id)
        except FeatureRangeError as error:
            job.error = error


class Stream:
    """Embeds slides, several at once.

    Args:
        backbone: a loaded backbone.
        batch_size: tiles per forward.
        on_slide: called once per finished slide, from one writer thread.
        on_tiles: called with the number of tiles of each finished batch.
    """

    def __init__(
        self,
        backbone: Backbone,
        batch_size: int,
        on_slide: Callable[[SlideJob], None],
        on_tiles: Callable[[int], None] = lambda n: None,
    ) -> None:
        self._backbone, self._batch_size = backbone, batch_size
        self._on_slide, self._on_tiles = on_slide, on_tiles
        self._cores = available_cores()
        self._workers = self._cores if backbone.device.type == "cpu" else 1
        self._slots = threading.Semaphore(2 * self._workers + self._cores)
        self._backlog = threading.Semaphore(8)
        self._failure: BaseException | None = None
        self.stats = StreamStats()

    def run(self, jobs: Iterable[SlideJob]) -> None:
        """Embed every job; returns when all are written.

        Raises:
            Exception: what ``on_slide`` or the backbone raised; work in flight is finished first.
        """
        threads = torch.get_num_threads()
        per_worker = 1 if self._backbone.device.type == "cpu" else threads
        torch.set_num_threads(per_worker)
        keep_freed_memory()
        try:
            with (
                ThreadPoolExecutor(1, "writer") as self._writer,
                ThreadPoolExecutor(self._workers, "backbone", torch.set_num_threads, (per_worker,)) as workers,
                ThreadPoolExecutor(self._cores, "reader") as readers,
            ):
                for rows in self._batches(jobs):
                    waiting = time.monotonic()
                    self._slots.acquire()
                    self.stats.waited_for_backbone_s += time.monotonic() - waiting
                    if self._failure is not None:
                        break
                    pixels = readers.submit(self._read, rows)
                    workers.submit(self._embed, pixels, rows).add_done_callback(self._release)
        finally:
            torch.set_num_threads(threads)
        if self._failure is not None:
            raise self._failure

    def _batches(self, jobs: Iterable[SlideJob]) -> Iterator[list[Row]]:
        rows: list[Row] = []
        for job in jobs:
            for row in range(len(job.coords)):
                if job.error is not None:
                    self._count_down(job, len(job.coords) - row)
                    break
                rows.append((job, row))
                if len(rows) == self._batch_size:
                    yield rows
                    rows = []
        if rows:
            yield rows

    def _read(self, rows: list[Row]) -> np.ndarray:
        """Decode a run of tiles into one batch; rows that fail stay zero and are noted."""
        started = time.thread_time()
        tile_px = rows[0][0].plan.tile_px
        pixels = np.zeros((self._batch_size, tile_px, tile_px, 3), dtype=np.uint8)
        for i, (job, row) in enumerate(rows):
            if job.error is not None:
                continue
            x_l0, y_l0 = job.coords[row]
            try:
                pixels[i] = job.slide.read_tile(int(x_l0), int(y_l0), job.plan)
            except TileDecodeError:
                with job.lock:
                    job.invalid_rows.append(row)
            except Exception as error:  # noqa: BLE001  whatever one slide does to its reader, the others go on
                job.error = error
        with self.stats.lock:
            self.stats.read_cpu_s += time.thread_time() - started
        return pixels

    def _embed(self, pixels: Future[np.ndarray], rows: list[Row]) -> None:
        waiting = time.monotonic()
        tiles = pixels.result()
        waited, started = time.monotonic() - waiting, time.thread_time()
        features = self._backbone.embed(tiles)
        spent = time.thread_time() - started
        for i, (job, row) in enumerate(rows):
            _store_row(job, row, features[i])
        with self.stats.lock:
            self.stats.tiles += len(rows)
            self.stats.backbone_cpu_s += spent
            self.stats.waited_for_tiles_s += waited
        self._on_tiles(len(rows))
        for job, _ in rows:
            self._count_down(job, 1)

    def _count_down(self, job: SlideJob, n_rows: int) -> None:
        """``n_rows`` more rows of a slide are dealt with; the last one sends it to the writer."""
        with job.lock:
            job.rows_left -= n_rows
            finished = job.rows_left == 0
        if finished:
            self._backlog.acquire()
            self._writer.submit(self._finish, job).add_done_callback(self._note_failure)

    def _finish(self, job: SlideJob) -> None:
        try:
            job.slide.close()
            job.features[job.invalid_rows] = 0.0
            self._on_slide(job)
        finally:
            self._backlog.release()

    def _release(self, done: Future[None]) -> None:
        self._note_failure(done)
        self._slots.release()

    def _note_failure(self, done: Future[None]) -> None:
        if done.exception() is not None and self._failure is None:
            self._failure = done.exception()
