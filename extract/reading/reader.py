"""The reading side of a run: opens slides, cuts them, and decodes runs of tiles into the ring.

It usually is a process of its own (``python -m extract.reading.reader``, started by `extract.reading.isolation`), so
that a file which kills its decoder does not kill the run. It imports no torch.
"""

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from extract.channel import Channel
from extract.errors import ExtractError, SlideUnreadableError, TileDecodeError
from extract.geometry import ReadPlan
from extract.memory import keep_freed_memory
from extract.reading.ring import INVALID, Ring, RingShape
from extract.slides.finding.source import SlideSource
from extract.slides.opening import open_slide
from extract.slides.slide_like import SlideLike
from extract.store import QualityRecipe, TileRecipe, from_dict
from extract.tiling.quality import tile_flags
from extract.tiling.tiles import cut_slide

PREPARING_THREADS = 2
"""Threads that open and cut slides while the others read tiles."""

_KEPT_OPEN = 6
_BEAT_S = 0.25

Send = Callable[[Mapping[str, Any], Sequence[np.ndarray]], None]
Request = dict[str, Any]


@dataclass
class _OpenSlide:
    """One slide that tiles are read from; opened by the first thread that needs it."""

    path: Path
    slide_id: str
    reader: str
    plan: ReadPlan
    quality: QualityRecipe | None
    coords: np.ndarray
    slide: SlideLike | None = None
    told: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def tell(self) -> dict[str, str] | None:
        """How the slide is read, and why not directly; said once."""
        with self.lock:
            if self.slide is None or self.told:
                return None
            self.told = True
            return {"reader": self.slide.reader, "note": self.slide.reader_note}

    def get(self) -> SlideLike:
        """The open slide."""
        with self.lock:
            if self.slide is None:
                self.slide = open_slide(self.path, self.slide_id, self.reader)
            return self.slide

    def close(self) -> None:
        """Close it if it was opened."""
        with self.lock:
            if self.slide is not None:
                self.slide.close()
                self.slide = None


class Reader:
    """Answers requests from threads of its own.

    ``cut`` answers with a tiles unit; ``probe`` with how many of some tiles can be decoded; ``open`` and ``close``
    frame the reading of one slide; ``read`` fills a part of a slot and answers when it is full.

    Args:
        ring: where tiles go.
        send: takes each answer and its arrays; called from several threads.
    """

    def __init__(self, ring: Ring, send: Send) -> None:
        self._ring, self._send = ring, send
        self._slides: dict[int, _OpenSlide] = {}
        self._cut_slides: OrderedDict[tuple[str, str, str], SlideLike] = OrderedDict()
        self._lock = threading.Lock()
        self._reads: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._cuts: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._threads = []
        for index in range(ring.shape.threads):
            requests = self._cuts if index < PREPARING_THREADS else self._reads
            thread = threading.Thread(target=self._serve, args=(index, requests), name=f"reader-{index}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def handle(self, request: Request, arrays: Sequence[np.ndarray]) -> None:
        """Take a request; the answer comes later through ``send``."""
        if request["do"] == "open":
            with self._lock:
                kept = self._cut_slides.pop(_identity(request), None)
            self._slides[request["key"]] = _OpenSlide(
                Path(request["path"]),
                request["slide_id"],
                request["reader"],
                ReadPlan(**request["plan"]),
                None if request["quality"] is None else from_dict(QualityRecipe, request["quality"]),
                arrays[0],
                kept,
            )
        elif request["do"] == "close":
            slide = self._slides.pop(request["key"], None)
            if slide is not None:
                slide.close()
        else:
            (self._reads if request["do"] == "read" else self._cuts).put(request)

    def close(self) -> None:
        """End the threads, after what they are at, and close every slide."""
        for index in range(len(self._threads)):
            (self._cuts if index < PREPARING_THREADS else self._reads).put(None)
        for thread in self._threads:
            thread.join()
        for opened in self._slides.values():
            opened.close()
        for kept in self._cut_slides.values():
            kept.close()

    def _serve(self, index: int, requests: "queue.SimpleQueue[Request | None]") -> None:
        at_work = self._ring.at_work[index]
        while (request := requests.get()) is not None:
            at_work[1], at_work[0] = time.monotonic_ns(), request["task"]
            try:
                answer, arrays = self._do(request)
            except Exception as error:  # noqa: BLE001  whatever a file does to its decoder is an answer
                answer, arrays = {"error": describe(error)}, []
            try:
                self._send(answer | {"task": request["task"]}, arrays)
            except Exception as error:  # noqa: BLE001  an answer there must be, or someone waits for ever
                self._send({"error": describe(error), "task": request["task"]}, [])
            # only now, so that an answer that is not taken is seen to stand still
            at_work[0] = 0

    def _do(self, request: Request) -> tuple[dict[str, Any], list[np.ndarray]]:
        if request["do"] == "cut":
            return self._cut(request)
        return (self._probe if request["do"] == "probe" else self._read)(request), []

    def _probe(self, request: Request) -> dict[str, Any]:
        """How many of some tiles of a slide can be decoded."""
        plan, readable = ReadPlan(**request["plan"]), 0
        slide = open_slide(Path(request["path"]), request["slide_id"], request["reader"])
        try:
            for x_l0, y_l0 in request["coords"]:
                with suppress(TileDecodeError):
                    slide.read_tile(x_l0, y_l0, plan)
                    readable += 1
        finally:
            slide.close()
        return {"readable": readable}

    def _cut(self, request: Request) -> tuple[dict[str, Any], list[np.ndarray]]:
        mask = request["mask"]
        slide = open_slide(Path(request["path"]), request["slide_id"], request["reader"])
        try:
            unit = cut_slide(
                slide,
                request["slide_id"],
                from_dict(TileRecipe, request["recipe"]),
                request["mpp"],
                request["default_mpp"],
                None if mask is None else Path(mask),
            )
        except BaseException:
            slide.close()
            raise
        self._keep(_identity(request), slide)
        arrays = (unit.coords, unit.tissue_fraction, unit.thumbnail, unit.tissue_mask)
        return {"record": dict(unit.record)}, [array for array in arrays if array is not None]

    def _keep(self, identity: tuple[str, str, str], slide: SlideLike) -> None:
        """Keep a slide that was cut open: its tiles are about to be read."""
        with self._lock:
            dropped = [self._cut_slides.pop(identity, None)]
            self._cut_slides[identity] = slide
            while len(self._cut_slides) > _KEPT_OPEN:
                dropped.append(self._cut_slides.popitem(last=False)[1])
        for each in dropped:
            if each is not None:
                each.close()

    def _read(self, request: Request) -> dict[str, Any]:
        """Decode runs of tiles, one after the other, into a part of a slot."""
        started = time.thread_time()
        slot, position = request["slot"], request["at"]
        errors: dict[str, Any] = {}
        opened: dict[str, Any] = {}
        damage: dict[str, str] = {}
        for key, start, stop in request["runs"]:
            source = self._slides.get(key)
            if source is None:
                errors[str(key)] = describe(SlideUnreadableError("it was given up"))
                position += stop - start
                continue
            try:
                if reason := self._read_run(source, range(start, stop), slot, position):
                    damage[str(key)] = reason
                if (told := source.tell()) is not None:
                    opened[str(key)] = told
            except Exception as error:  # noqa: BLE001  it ends this slide, not the others
                errors.setdefault(str(key), describe(error))
            position += stop - start
        return {"errors": errors, "opened": opened, "damage": damage, "cpu_s": time.thread_time() - started}

    def _read_run(self, source: _OpenSlide, rows: range, slot: int, position: int) -> str:
        """Decode consecutive tiles of a slide, and flag them; what the decoder says of the first that it cannot."""
        slide = source.get()
        pixels = self._ring.pixels[slot, position : position + len(rows)]
        flags = self._ring.flags[slot, position : position + len(rows)]
        # until they are read; what an error leaves unread passes for nothing else
        flags[:] = INVALID
        invalid, damage = [], ""
        for i, row in enumerate(rows):
            x_l0, y_l0 = source.coords[row]
            try:
                slide.read_tile(int(x_l0), int(y_l0), source.plan, out=pixels[i])
            except TileDecodeError as error:
                pixels[i] = 0
                invalid.append(i)
                damage = damage or str(error)
        flags[:] = 0 if source.quality is None else tile_flags(pixels, source.quality, source.plan.achieved_mpp)
        flags[invalid] = INVALID
        return damage


def _identity(request: Request) -> tuple[str, str, str]:
    """Which slide a request is about, and how it is read."""
    return request["path"], request["slide_id"], request["reader"]


def describe(error: Exception) -> dict[str, str]:
    """An error as plain values: its kind, its message, and its trace where it is not one that we raise on purpose."""
    expected = isinstance(error, (ExtractError, OSError))
    trace = "" if expected else "".join(traceback.format_exception(error))
    if isinstance(error, MemoryError):
        return {"kind": "MemoryError", "message": "", "trace": ""}
    return {"kind": type(error).__name__, "message": str(error), "trace": trace}


def open_request(
    key: int, path: Path, slide_id: str, reader: str, plan: ReadPlan, quality: QualityRecipe | None
) -> Request:
    """The request that begins the reading of a slide; its tile corners go with it as an array."""
    return {
        "do": "open",
        "key": key,
        "path": str(path),
        "slide_id": slide_id,
        "reader": reader,
        "plan": asdict(plan),
        "quality": None if quality is None else asdict(quality),
    }


def cut_request(source: SlideSource, reader: str, recipe: TileRecipe, default_mpp: float | None) -> Request:
    """The request to cut a slide; its answer is a tiles unit."""
    return {
        "do": "cut",
        "path": os.fspath(source.path),
        "slide_id": source.slide_id,
        "reader": reader,
        "recipe": asdict(recipe),
        "mpp": source.mpp,
        "default_mpp": default_mpp,
        "mask": None if source.mask is None else os.fspath(source.mask),
    }


def probe_request(source: SlideSource, reader: str, plan: ReadPlan, coords: Sequence[tuple[int, int]]) -> Request:
    """The request to try some tiles; its answer says how many of them can be decoded."""
    return {
        "do": "probe",
        "path": os.fspath(source.path),
        "slide_id": source.slide_id,
        "reader": reader,
        "plan": asdict(plan),
        "coords": [list(corner) for corner in coords],
    }


def limit_memory(n_bytes: int) -> None:
    """Refuse this process more than so much memory of its own, where the system can; shared buffers do not count."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (n_bytes, n_bytes))
    except (ImportError, AttributeError, ValueError, OSError):
        return


def _beat(ring: Ring, parent: int) -> None:
    """Show that this process runs; end it when the run is gone, whatever its other threads hang in."""
    while os.getppid() == parent:
        ring.beat[0] = time.monotonic_ns()
        time.sleep(_BEAT_S)
    os._exit(0)


def main() -> None:
    """Serve one run: ring and pipe are inherited, the arguments say where they are."""
    options = json.loads(sys.argv[1])
    # these reach the whole group or job; the run decides when its reader ends
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    limit_memory(options["memory_bytes"])
    keep_freed_memory()
    ring = Ring(RingShape(**options["shape"]), options["ring"])
    channel = Channel(Connection(options["pipe"]))
    threading.Thread(target=_beat, args=(ring, options["parent"]), name="heartbeat", daemon=True).start()

    def send(answer: Mapping[str, Any], arrays: Sequence[np.ndarray]) -> None:
        # a run that is gone takes no answers
        with suppress(OSError):
            channel.send(answer, arrays)

    reader = Reader(ring, send)
    while True:
        try:
            request, arrays = channel.receive()
        except (EOFError, OSError):
            # the run is gone, and a thread may hang in a decoder: no farewell
            os._exit(0)
        reader.handle(request, arrays)


if __name__ == "__main__":
    main()
