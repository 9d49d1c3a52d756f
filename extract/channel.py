"""Messages between a run and its reading process: JSON and plain arrays, never pickled objects.

The process that decodes strangers' files is the one that may be taken over by them; what it says is read as data only.
"""

import json
import struct
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

Message = tuple[dict[str, Any], list[np.ndarray]]

_MAX_BYTES = 1 << 31
_PATIENCE_S = 2.0
_LENGTH = struct.Struct("<Q")


class Channel:
    """One end of a pipe; several threads may send, one receives."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, values: Mapping[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
        """Send plain values and arrays as one message.

        Raises:
            OSError: nobody is at the other end.
        """
        header = dict(values) | {"arrays": [[array.dtype.str, list(array.shape)] for array in arrays]}
        text = json.dumps(header).encode()
        parts = [_LENGTH.pack(len(text)), text, *(np.ascontiguousarray(array).tobytes() for array in arrays)]
        with self._lock:
            try:
                self._connection.send_bytes(b"".join(parts))
            except TypeError as error:
                # closed by another thread meanwhile, it has no number any more
                raise OSError("closed while something was sent") from error

    def poll(self, timeout_s: float) -> bool:
        """Whether a message, or the end, is there within the time."""
        return self._connection.poll(timeout_s)

    def receive(self) -> Message:
        """The next message.

        Raises:
            EOFError: the other end is closed.
            ValueError: what came is no message.
        """
        content = self._connection.recv_bytes(_MAX_BYTES)
        (length,) = _LENGTH.unpack_from(content)
        start = _LENGTH.size + length
        values = json.loads(content[_LENGTH.size : start])
        arrays = []
        for text, shape in values.pop("arrays"):
            dtype, count = np.dtype(text), int(np.prod(shape))
            if dtype.hasobject:
                raise ValueError(f"got an array of {dtype} → expected numbers")
            arrays.append(np.frombuffer(content, dtype, count, start).reshape(shape))
            start += count * dtype.itemsize
        return values, arrays

    def close(self) -> None:
        """Close this end; whoever sends is waited for, but not for ever."""
        # its number may be another file's as soon as it is closed
        waited = self._lock.acquire(timeout=_PATIENCE_S)
        self._connection.close()
        if waited:
            self._lock.release()
