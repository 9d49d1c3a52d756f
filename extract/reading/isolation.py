"""The reading process as a run sees it: requests in, answers out, and whatever kills or stalls it is a slide's fault.

Every thread of the reader notes in the ring what it is at. When the process dies, those tasks are the suspects: they
are repeated one at a time in a new process, so that the guilty one is found and the others lose nothing, nor does a
slide for a death that came from outside. A guilty run of tiles is repeated tile by tile; a tile that kills again is
invalid, and a slide that kills three times is given up.
"""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np

from extract.channel import Channel, Message
from extract.errors import ReaderError
from extract.reading.answers import check_answer, killed
from extract.reading.ring import INVALID, Ring

KILLS_PER_SLIDE = 3
"""A slide that kills its reader so often is given up."""

_STARTS_WITHOUT_WORK = 5
_AWAY_S = 5.0
_SILENT_S = 60.0
"""A process that has not run for so long, or for its limit of a read if that is shorter, is stopped or stuck."""
_FIRST_BEAT_S = 120.0
_KILL_S = 5.0
_SEND_S = 30

_alive: set["subprocess.Popen[bytes]"] = set()


def kill_readers() -> None:
    """Kill every reading process of this process at once: it is about to end without a farewell."""
    for process in list(_alive):
        process.kill()


_NO_ANSWER = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)
"""What reading a message raises that is none of ours."""


@dataclass(frozen=True)
class ReaderLimits:
    """What a reading process may take.

    Attributes:
        memory_bytes: memory of its own; a decoder that wants more fails.
        cut_s: seconds to open a slide and find its tissue.
        read_s: seconds to decode one run of tiles.
    """

    memory_bytes: int = 8 << 30
    cut_s: float = 900.0
    read_s: float = 180.0


@dataclass
class _Task:
    """A request that is not answered yet; ``parts`` are the single tiles that a guilty one was split into."""

    number: int
    values: dict[str, Any]
    future: "Future[Message]" = field(default_factory=Future)
    whole: "_Task | None" = None
    parts: int = 0
    errors: dict[str, Any] = field(default_factory=dict)
    cpu_s: float = 0.0

    @property
    def limit(self) -> str:
        """Name of its time limit."""
        return "read_s" if self.values["do"] == "read" else "cut_s"


class ReaderProcess:
    """A reading process that is replaced when it dies, hangs or takes too much memory.

    Args:
        ring: where tiles go.
        limits: what the process may take.
    """

    module = "extract.reading.reader"
    """What the process runs."""

    def __init__(self, ring: Ring, limits: ReaderLimits | None = None) -> None:
        self._ring, self._limits = ring, limits or ReaderLimits()
        self._lock = threading.RLock()
        self._tasks: dict[int, _Task] = {}
        self._opened: dict[int, tuple[dict[str, Any], list[np.ndarray]]] = {}
        self._suspects: deque[_Task] = deque()
        self._on_trial: _Task | None = None
        self._kills: Counter[int] = Counter()
        self._next, self._starts = 1, 0
        self._closed = False
        self._awake_since = time.monotonic()
        self._failure: ReaderError | None = None
        self._start()
        self._thread = threading.Thread(target=self._receive, name="reader-answers", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        """Id of the present process."""
        return self._process.pid

    def request(self, values: Mapping[str, Any]) -> "Future[Message]":
        """Ask for a cut or a read; the future fails only if the reader cannot be kept running at all.

        Raises:
            ReaderError: the reader is closed, or could not be kept running.
        """
        with self._lock:
            if self._closed:
                raise self._failure or ReaderError("got a request after the reader was closed → ask before")
            task = _Task(self._next, dict(values) | {"task": self._next})
            self._next += 1
            self._tasks[task.number] = task
            channel = self._channel if self._on_trial is None else None
        # outside the lock: a process that takes nothing in must not keep its answers, and its end, from being seen. If
        # it is replaced meanwhile, this channel is closed, and the new process gets the task from whoever replaced it
        if channel is not None:
            _send(channel, task.values)
        return task.future

    def tell(self, values: Mapping[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
        """Begin or end the reading of a slide."""
        with self._lock:
            if values["do"] == "open":
                self._opened[values["key"]] = (dict(values), list(arrays))
            else:
                self._opened.pop(values["key"], None)
                self._kills.pop(values["key"], None)
            channel = self._channel
        _send(channel, values, arrays)

    def close(self) -> None:
        """End the process; what was asked and not answered fails."""
        with self._lock:
            self._closed = True
            self._channel.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=2)
        self._kill()
        self._thread.join()

    def _start(self) -> None:
        ours, theirs = Pipe()
        options = {
            "shape": self._ring.shape.to_dict(),
            "ring": self._ring.descriptor,
            "pipe": theirs.fileno(),
            "parent": os.getpid(),
            "memory_bytes": self._limits.memory_bytes,
        }
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._ring.at_work[:] = 0
        self._ring.beat[:] = 0
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            # -P: nothing is imported from the folder that the user happens to be in
            [sys.executable, "-P", "-m", self.module, json.dumps(options)],
            pass_fds=(self._ring.descriptor, theirs.fileno()),
            stdin=subprocess.DEVNULL,
            # Ctrl-C in a terminal is for the run, which ends its reader itself
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        theirs.close()
        _alive.add(self._process)
        _limit_sending(ours.fileno())
        self._channel = Channel(ours)
        self._starts += 1
        for values, arrays in self._opened.values():
            _send(self._channel, values, arrays)

    def _kill(self) -> None:
        """End the process. One that hangs in the kernel, as on a network disk that is away, ends when that answers."""
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_KILL_S)
        _alive.discard(self._process)

    def _receive(self) -> None:
        """Serve until the end; whatever goes wrong here is told to all who wait."""
        try:
            self._take_answers()
        except Exception as error:  # noqa: BLE001  nobody else could tell them
            with self._lock:
                self._kill()
                self._give_up(f"could not be kept running ({type(error).__name__}: {error})")
        for task in list(self._tasks.values()):
            (task.whole or task).future.cancel()

    def _take_answers(self) -> None:
        """Take answers; notice death and standstill."""
        checked = self._awake_since = time.monotonic()
        while not self._closed:
            try:
                if self._channel.poll(0.2):
                    self._answer(*self._channel.receive())
            except (EOFError, OSError):
                if not self._closed:
                    self._recover(self._cause_of_death())
            except _NO_ANSWER:
                # whatever speaks there is no reader any more
                self._kill()
                self._recover("sent what is no answer")
            now = time.monotonic()
            if now - checked > _AWAY_S:
                # this process was suspended, and the reader may have been: clocks begin anew
                self._awake_since = now
            if now - checked > 0.5:
                checked = now
                self._check_standstill()

    def _answer(self, values: dict[str, Any], arrays: list[np.ndarray]) -> None:
        with self._lock:
            task = self._tasks.get(values["task"])
            if task is None:
                return
            checked = check_answer(values, task.values)
            self._tasks.pop(task.number)
            self._starts = 0
            if task.whole is None:
                done = [(task, (checked, arrays))]
            else:
                done = self._part_done(task, checked["errors"], checked["cpu_s"])
            if task is self._on_trial:
                self._next_trial()
        for finished, message in done:
            finished.future.set_result(message)

    def _part_done(self, part: _Task, errors: Mapping[str, Any], cpu_s: float) -> list[tuple[_Task, Message]]:
        """Account for one tile of a split run; the run itself, once all its tiles are dealt with."""
        whole = part.whole
        if whole is None:
            return []
        whole.parts -= 1
        whole.errors = {**errors, **whole.errors}
        whole.cpu_s += cpu_s
        if whole.parts:
            return []
        return [(whole, ({"task": whole.number, "errors": whole.errors, "cpu_s": whole.cpu_s}, []))]

    def _check_standstill(self) -> None:
        """Kill the process when it does not run, or a thread has been at one task for too long: that task's fault."""
        seen, limit = int(self._ring.beat[0]) / 1e9, min(self._limits.read_s, _SILENT_S)
        if time.monotonic() - max(seen, self._started, self._awake_since) > (limit if seen else _FIRST_BEAT_S):
            self._kill()
            self._recover(f"did not run for {limit:g} s")
            return
        now = time.monotonic_ns()
        for number, since in self._ring.at_work.tolist():
            task = self._tasks.get(number)
            if task is None:
                continue
            limit = getattr(self._limits, task.limit)
            if now - max(since, int(self._awake_since * 1e9)) > limit * 1e9:
                self._kill()
                self._recover(f"stood still for {limit:g} s", [task])
                return

    def _cause_of_death(self) -> str:
        try:
            code = self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            # its end of the pipe is closed, or what it sent was no message
            self._kill()
            code = -signal.SIGKILL
        if code >= 0:
            return f"ended with exit code {code}"
        with suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
        return f"was killed by signal {-code}"

    def _recover(self, cause: str, guilty: Sequence[_Task] = ()) -> None:
        """Find whom to blame, start a new process, and go on."""
        with self._lock:
            if self._closed:
                return
            numbers = [int(number) for number in self._ring.at_work[:, 0] if number]
            at_work = list(guilty) or [self._tasks[number] for number in numbers if number in self._tasks]
            trial, self._on_trial = self._on_trial, None
            # the first death proves nothing: the machine may have run out of memory, or a scheduler have sent a signal
            convicted = at_work if guilty or at_work == [trial] else []
            self._channel.close()
            done: list[tuple[_Task, Message]] = []
            if at_work:
                # it had begun to work: the fault is a slide's
                self._starts = 0
            for task in convicted:
                self._tasks.pop(task.number)
                done += self._convict(task, cause)
            if not convicted:
                self._suspects.extendleft(reversed(at_work))
            if trial is not None and trial not in at_work:
                self._suspects.appendleft(trial)
            if self._starts >= _STARTS_WITHOUT_WORK:
                self._give_up(cause)
                return
            self._start()
            self._next_trial(resend=True)
        for task, message in done:
            task.future.set_result(message)

    def _next_trial(self, resend: bool = False) -> None:
        """Send the next suspect alone; without one, send all that waits (``resend``: to a new process)."""
        was_trial, self._on_trial = self._on_trial is not None, None
        while self._suspects:
            task = self._suspects.popleft()
            if task.number in self._tasks:
                self._on_trial = task
                _send(self._channel, task.values)
                return
        if was_trial or resend:
            for task in list(self._tasks.values()):
                _send(self._channel, task.values)

    def _convict(self, task: _Task, cause: str) -> list[tuple[_Task, Message]]:
        """Deal with the task that killed its reader: a cut fails, a run is split, a tile is invalid."""
        values = task.values
        if values["do"] != "read":
            description = killed(values["slide_id"], cause)
            return [(task, ({"task": task.number, "error": description}, []))]
        tiles = [(key, row) for key, start, stop in values["runs"] for row in range(start, stop)]
        if len(tiles) > 1:
            self._split(task, tiles)
            return []
        key = tiles[0][0]
        self._kills[key] += 1
        self._ring.pixels[values["slot"], values["at"]] = 0
        self._ring.flags[values["slot"], values["at"]] = INVALID
        errors = {}
        if self._kills[key] >= KILLS_PER_SLIDE:
            # the next process does not know the slide, and answers whatever else is asked of it at once
            slide = self._opened.pop(key, None)
            errors[str(key)] = killed(slide[0]["slide_id"] if slide else str(key), cause)
        if task.whole is not None:
            return self._part_done(task, errors, 0.0)
        return [(task, ({"task": task.number, "errors": errors, "cpu_s": 0.0}, []))]

    def _split(self, whole: _Task, tiles: Sequence[tuple[int, int]]) -> None:
        """Put the tiles of a guilty run on trial one by one."""
        parts = []
        for i, (key, row) in enumerate(tiles):
            values = {"task": self._next, "at": whole.values["at"] + i, "runs": [[key, row, row + 1]]}
            parts.append(_Task(self._next, whole.values | values, whole=whole))
            self._tasks[self._next] = parts[-1]
            self._next += 1
        whole.parts = len(parts)
        self._suspects.extendleft(reversed(parts))

    def _give_up(self, cause: str) -> None:
        error = ReaderError(
            f"got a reading process that {cause} {self._starts} times before it did anything → it must start → run mil "
            f"doctor, or read in this process with --no-isolation"
        )
        self._closed, self._failure = True, error
        waiting, self._tasks = {id(task.whole or task): task.whole or task for task in self._tasks.values()}, {}
        for task in waiting.values():
            task.future.set_exception(error)


def _send(channel: Channel, values: Mapping[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
    """Send, if anyone is there: a process that is gone is noticed where answers are awaited, and replaced."""
    with suppress(OSError):
        channel.send(values, arrays)


def _limit_sending(descriptor: int) -> None:
    """Let a pipe that nobody empties refuse what is sent after a while, instead of waiting for ever."""
    with socket.socket(fileno=os.dup(descriptor)) as pipe:
        pipe.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_S, 0))
