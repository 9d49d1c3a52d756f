"""Whoever reads slides for a run; and the simplest of them, the threads of this process."""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np

from extract.channel import Message
from extract.reading.reader import PREPARING_THREADS, Reader
from extract.reading.ring import Ring


class Readers(Protocol):
    """Whoever answers the requests of `extract.reading.reader.Reader`."""

    def request(self, values: Mapping[str, Any]) -> "Future[Message]":
        """Ask for a cut or a read."""

    def tell(self, values: Mapping[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
        """Begin or end the reading of a slide."""

    def close(self) -> None:
        """End the reading."""


class LocalReaders:
    """Reads in threads of this process: for debugging, and where there is no second process to be had."""

    def __init__(self, ring: Ring) -> None:
        self._futures: dict[int, Future[Message]] = {}
        self._lock = threading.Lock()
        self._next = 1
        self._reader = Reader(ring, self._answer)

    def request(self, values: Mapping[str, Any]) -> "Future[Message]":
        """Ask for a cut or a read."""
        future: Future[Message] = Future()
        with self._lock:
            task, self._next = self._next, self._next + 1
            self._futures[task] = future
        self._reader.handle(dict(values) | {"task": task}, ())
        return future

    def tell(self, values: Mapping[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
        """Begin or end the reading of a slide."""
        self._reader.handle(dict(values), arrays)

    def close(self) -> None:
        """End the threads."""
        self._reader.close()

    def _answer(self, values: Mapping[str, Any], arrays: Sequence[np.ndarray]) -> None:
        with self._lock:
            future = self._futures.pop(values["task"])
        future.set_result((dict(values), list(arrays)))


def reading_threads(cores: int) -> int:
    """Threads of a reading process: those that cut, and one per core that reads."""
    return PREPARING_THREADS + cores
