"""The stream: tiles of many slides → fixed-size batches → backbones → one matrix per slide and entry.

Batches run across slides, so that the device never waits for a slide to end, and each has the same size, so that a row
does not depend on how the run was cut. The reading process fills the slots of a ring, the backbones empty them, and one
writer commits what is finished. On a CPU every core runs whole batches with one thread each, which wastes nothing on
waiting inside operators; on a GPU one thread keeps a few batches under way: copy in, compute, copy out.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from extract.channel import Message
from extract.errors import ReaderError
from extract.memory import keep_freed_memory
from extract.pipeline.batches import Batch, Run, split_runs
from extract.pipeline.jobs import Column, SlideJob, StreamStats, workers
from extract.reading.answers import rebuild_error
from extract.reading.reader import open_request
from extract.reading.readers import Readers
from extract.reading.ring import Ring

_UNDER_WAY = 3
_BACKLOG = 8


class Stream:
    """Embeds slides, several at once.

    Args:
        ring: the buffers between reading and embedding.
        readers: fill them.
        device: where the backbones run.
        on_slide: called once per finished slide, from one writer thread.
        on_tiles: called with the number of tiles of each finished batch.
        stopped: asked before each batch; once it says True, no further one is begun.
    """

    def __init__(
        self,
        ring: Ring,
        readers: Readers,
        device: torch.device,
        on_slide: Callable[[SlideJob], None],
        on_tiles: Callable[[int], None] = lambda n: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self._ring, self._readers, self._device = ring, readers, device
        self._on_slide, self._on_tiles, self._stopped = on_slide, on_tiles, stopped
        self._workers = workers(device)
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(ring.shape.slots):
            self._free.put(slot)
        self._ready: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._backlog = threading.Semaphore(_BACKLOG)
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        self._open: dict[int, SlideJob] = {}
        self._keys = 0
        self.stats = StreamStats(workers=self._workers)

    @property
    def open_jobs(self) -> list[SlideJob]:
        """The slides that are under way."""
        with self._lock:
            return list(self._open.values())

    def run(self, jobs: Iterable[SlideJob | None]) -> None:
        """Embed every job; returns when all are written.

        A None among the jobs says that the next one may take long: what has come so far is embedded, in a batch that is
        not full.

        When it ends early (``stopped``, a full disk), batches under way are finished and rows are saved in the drafts.

        Raises:
            Exception: what ``on_slide`` or a backbone raised.
        """
        threads = torch.get_num_threads()
        per_worker = 1 if self._device.type == "cpu" else threads
        torch.set_num_threads(per_worker)
        if self._device.type == "cpu":
            keep_freed_memory()
        self.stats.started = time.monotonic()
        try:
            with ThreadPoolExecutor(1, "writer") as self._writer:
                try:
                    with ThreadPoolExecutor(self._workers, "backbone", torch.set_num_threads, (per_worker,)) as pool:
                        done = [pool.submit(self._work) for _ in range(self._workers)]
                        try:
                            self._feed(jobs)
                        finally:
                            self._drain(done)
                finally:
                    # by the writer, which may be saving one of them
                    for job in self.open_jobs:
                        self._writer.submit(self._save, job).add_done_callback(self._note_failure)
        finally:
            torch.set_num_threads(threads)
        if self._failure is not None:
            raise self._failure

    def _feed(self, jobs: Iterable[SlideJob | None]) -> None:
        """Give the readers one slot after the other to fill."""
        for columns, runs in self._batches(jobs):
            waiting = time.monotonic()
            slot = self._free.get()
            self.stats.waited_for_backbone_s += time.monotonic() - waiting
            if self._failure is not None or self._stopped():
                self._free.put(slot)
                return
            self._read(Batch(slot, runs, columns))

    def _drain(self, workers_done: Sequence["Future[None]"]) -> None:
        """Wait until every slot is back, then end the workers."""
        for _ in range(self._ring.shape.slots):
            self._free.get()
        for _ in range(self._workers):
            self._ready.put(None)
        for worker in workers_done:
            self._note_failure(worker)

    def _batches(self, jobs: Iterable[SlideJob | None]) -> Iterator[tuple[tuple[Column, ...], list[Run]]]:
        """Runs of rows in batches of one size; slides that are embedded alike share batches."""
        size = self._ring.shape.batch_size
        collected: dict[tuple[int, ...], tuple[tuple[Column, ...], list[Run], int]] = {}
        for job in self._begin(jobs):
            if job is None:
                yield from ((columns, runs) for columns, runs, _ in collected.values())
                collected.clear()
                continue
            kind = tuple(id(column) for column in job.columns)
            columns, runs, count = collected.pop(kind, (job.columns, [], 0))
            row = job.first_row
            while row < len(job.coords):
                if job.error is not None:
                    self._count_down(job, row, len(job.coords))
                    break
                stop = min(row + size - count, len(job.coords))
                runs.append((job, row, stop))
                count, row = count + stop - row, stop
                if count == size:
                    yield columns, runs
                    runs, count = [], 0
            if runs:
                collected[kind] = (columns, runs, count)
        for columns, runs, _ in collected.values():
            yield columns, runs

    def _begin(self, jobs: Iterable[SlideJob | None]) -> Iterator[SlideJob | None]:
        """Tell the readers of each slide as it comes."""
        remaining = iter(jobs)
        while True:
            waiting = time.monotonic()
            try:
                job = next(remaining)
            except StopIteration:
                return
            finally:
                self.stats.waited_for_slides_s += time.monotonic() - waiting
            if job is None:
                yield None
                continue
            self._keys += 1
            job.key = self._keys
            with self._lock:
                self._open[job.key] = job
            if job.rows_left == 0:
                self._submit_finish(job)
                continue
            request = open_request(job.key, job.path, job.slide_id, job.reader, job.plan, job.quality)
            self._readers.tell(request, [job.coords])
            yield job

    def _read(self, batch: Batch) -> None:
        """Ask for the tiles of a batch, a run per task."""
        if batch.n_tiles < self._ring.shape.batch_size:
            self._ring.pixels[batch.slot, batch.n_tiles :] = 0
        tasks = split_runs(batch.runs)
        batch.tasks_left = len(tasks)
        for at, runs in tasks:
            keyed = [[job.key, start, stop] for job, start, stop in runs]
            future = self._request({"do": "read", "slot": batch.slot, "at": at, "runs": keyed})
            future.add_done_callback(lambda done: self._task_done(batch, done))

    def _request(self, values: dict[str, Any]) -> "Future[Message]":
        """Ask the readers; a reader that cannot be kept running fails the future, so that the slot comes back."""
        try:
            return self._readers.request(values)
        except ReaderError as error:
            failed: Future[Message] = Future()
            failed.set_exception(error)
            return failed

    def _task_done(self, batch: Batch, done: "Future[Message]") -> None:
        """Take the readers' answer; the last one of a batch sends it to the backbones."""
        if done.cancelled():
            self._fail(ReaderError("got a reader that was closed before it had answered → run the command again"))
        elif (error := done.exception()) is not None:
            self._fail(error)
        else:
            self._take_answer(batch, done.result()[0])
        with self._lock:
            batch.tasks_left -= 1
            last = batch.tasks_left == 0
        if last:
            self._ready.put(batch)

    def _take_answer(self, batch: Batch, answer: dict[str, Any]) -> None:
        """Note the slides that cannot be read on, and the time that reading took."""
        jobs = {str(job.key): job for job, _, _ in batch.runs}
        errors = dict.fromkeys(jobs, answer["error"]) if "error" in answer else answer["errors"]
        for key, description in errors.items():
            jobs[key].error = jobs[key].error or rebuild_error(description, jobs[key].slide_id)
        for key, told in answer.get("opened", {}).items():
            jobs[key].read_by = ": ".join(filter(None, (told["reader"], told["note"])))
        for key, text in answer.get("damage", {}).items():
            jobs[key].damage = jobs[key].damage or text
        with self.stats.lock:
            self.stats.read_cpu_s += answer.get("cpu_s", 0.0)

    def _next_batch(self) -> Batch | None:
        waiting = time.monotonic()
        batch = self._ready.get()
        with self.stats.lock:
            self.stats.waited_for_tiles_s += time.monotonic() - waiting
        return batch

    def _work(self) -> None:
        """Embed until the end; a worker that fails gives back the slots that come, so that nobody waits for them."""
        try:
            if self._device.type == "cpu":
                self._work_cpu()
            else:
                with torch.cuda.device(self._device):
                    self._work_cuda()
        except BaseException as error:  # noqa: BLE001  raised again by run()
            self._fail(error)
            while (batch := self._ready.get()) is not None:
                self._free.put(batch.slot)

    def _work_cpu(self) -> None:
        while (batch := self._next_batch()) is not None:
            try:
                if self._failure is None:
                    self._embed_cpu(batch)
            except BaseException as error:  # noqa: BLE001  raised again by run(), once what is under way is safe
                self._fail(error)
            finally:
                self._free.put(batch.slot)

    def _embed_cpu(self, batch: Batch) -> None:
        started = time.monotonic()
        tiles = self._ring.pixels[batch.slot]
        features = []
        for column in batch.columns:
            seen = tiles if not column.view else batch.augmented(column, torch.from_numpy(tiles)).numpy()
            features.append(column.backbone.embed(seen))
        with self.stats.lock:
            self.stats.device_busy_s += time.monotonic() - started
        self._store(batch, features)

    def _work_cuda(self) -> None:
        """Keep a few batches under way: each is copied in, computed and copied out without waiting for the last."""
        under_way: deque[tuple[Batch, list[Tensor], Any, Any, Any]] = deque()
        copies = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        pinned = _pin(self._ring.pixels)
        try:
            while True:
                if under_way and (len(under_way) >= _UNDER_WAY or self._ready.empty()):
                    self._harvest(*under_way.popleft())
                    continue
                batch = self._next_batch()
                if batch is None:
                    return
                if self._failure is None:
                    try:
                        under_way.append(self._launch(batch, copies))
                    except BaseException as error:  # noqa: BLE001  raised again by run()
                        self._fail(error)
                        self._free.put(batch.slot)
                else:
                    self._free.put(batch.slot)
        finally:
            # a launch that failed may have left a copy under way
            torch.cuda.synchronize(self._device)
            if pinned:
                torch.cuda.cudart().cudaHostUnregister(self._ring.pixels.ctypes.data)  # type: ignore[no-untyped-call]

    def _launch(self, batch: Batch, copies: "torch.cuda.Stream") -> tuple[Batch, list[Tensor], Any, Any, Any]:
        compute = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(copies):
            tiles = torch.from_numpy(self._ring.pixels[batch.slot]).to(self._device, non_blocking=True)
        compute.wait_stream(copies)
        tiles.record_stream(compute)
        started, computed, finished = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(3)
        )
        started.record(compute)
        rows = []
        for column in batch.columns:
            seen = batch.augmented(column, tiles) if column.view else tiles
            rows.append(column.backbone.forward(column.backbone.prepare(seen)))
        computed.record(compute)
        copied = [torch.empty(row.shape, dtype=row.dtype, pin_memory=True) for row in rows]
        for target, row in zip(copied, rows, strict=True):
            target.copy_(row, non_blocking=True)
        finished.record(compute)
        return batch, copied, started, computed, finished

    def _harvest(self, batch: Batch, features: list[Tensor], started: Any, computed: Any, finished: Any) -> None:
        try:
            finished.synchronize()
            with self.stats.lock:
                self.stats.device_busy_s += started.elapsed_time(computed) / 1000
            self._store(batch, [each.numpy() for each in features])
        except BaseException as error:  # noqa: BLE001  raised again by run()
            self._fail(error)
        finally:
            self._free.put(batch.slot)

    def _store(self, batch: Batch, features: Sequence[np.ndarray]) -> None:
        """Put the rows of a batch in their places."""
        flags, position = self._ring.flags[batch.slot], 0
        for job, start, stop in batch.runs:
            rows = slice(position, position + stop - start)
            if job.error is None:
                job.flags[start:stop] = flags[rows]
                job.fill(start, stop, [each[rows] for each in features])
            position = rows.stop
        with self.stats.lock:
            self.stats.tiles += position
        self._on_tiles(position)
        for job, start, stop in batch.runs:
            self._count_down(job, start, stop)

    def _count_down(self, job: SlideJob, start: int, stop: int) -> None:
        """Rows of a slide are dealt with; the last ones send it to the writer."""
        last, due = job.finish_rows(start, stop)
        if last:
            self._submit_finish(job)
        elif due and job.error is None:
            self._writer.submit(self._save, job).add_done_callback(self._note_failure)

    def _submit_finish(self, job: SlideJob) -> None:
        waiting = time.monotonic()
        self._backlog.acquire()
        with self.stats.lock:
            self.stats.waited_for_writer_s += time.monotonic() - waiting
        self._writer.submit(self._finish, job).add_done_callback(self._note_failure)

    def _finish(self, job: SlideJob) -> None:
        try:
            self._readers.tell({"do": "close", "key": job.key})
            self._on_slide(job)
            with self._lock:
                self._open.pop(job.key, None)
        finally:
            self._backlog.release()

    def _save(self, job: SlideJob) -> None:
        if job.drafts and job.rows_left and job.error is None:
            job.save()

    def _fail(self, error: BaseException | None) -> None:
        self._failure = self._failure or error

    def _note_failure(self, done: "Future[None]") -> None:
        if not done.cancelled() and done.exception() is not None:
            self._fail(done.exception())


def _pin(pixels: np.ndarray) -> bool:
    """Lock the ring's pages for the device, so that copies run beside the computation; slower where that is refused."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    code = runtime.cudaHostRegister(pixels.ctypes.data, pixels.nbytes, 0)
    if int(code) == 0:
        return True
    # CUDA keeps the error until someone asks, and would blame the next launch for it
    with suppress(RuntimeError):
        torch.cuda.check_error(int(code))
    return False
