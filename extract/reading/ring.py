"""A ring of tile buffers in memory that two processes share: one fills them, the other empties them."""

import fcntl
import mmap
import os
import tempfile
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

_PAGE = 4096

# numbers of Linux's fcntl.h, which Python 3.11 does not name
_ADD_SEALS, _SEAL_SEAL, _SEAL_SHRINK, _SEAL_GROW = 1033, 1, 2, 4
INVALID = 0x80
"""Flag of a tile that could not be decoded; the bits below are those of `extract.tiling.quality`."""


@dataclass(frozen=True)
class RingShape:
    """How large a ring is.

    Attributes:
        slots: buffers in the ring.
        batch_size: tiles per buffer.
        tile_px: side of a tile in pixels.
        threads: threads that note in the ring what they are at.
    """

    slots: int
    batch_size: int
    tile_px: int
    threads: int

    @property
    def pixel_bytes(self) -> int:
        """Bytes of all pixels, padded to whole pages."""
        return _pages(self.slots * self.batch_size * self.tile_px**2 * 3)

    @property
    def flag_bytes(self) -> int:
        """Bytes of all flags, padded to whole pages."""
        return _pages(self.slots * self.batch_size)

    @property
    def total_bytes(self) -> int:
        """Bytes of the ring."""
        return self.pixel_bytes + self.flag_bytes + _pages(self.threads * 16 + 8)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the process on the other side."""
        return asdict(self)


class Ring:
    """The buffers, mapped into this process.

    The memory belongs to an open file without a name: it counts as memory, not as ``/dev/shm``, which containers keep
    at 64 MB, and it is gone when both processes are.

    Attributes:
        pixels: uint8 [slots, batch_size, tile_px, tile_px, 3].
        flags: uint8 [slots, batch_size], `INVALID` and the bits of `extract.tiling.quality`.
        at_work: int64 [threads, 2]: the task that a thread is at (0 for none), and since when in monotonic ns.
        beat: int64 [1]: when the process that fills the buffers was last seen to run, in monotonic ns; 0 at first.
    """

    def __init__(self, shape: RingShape, descriptor: int | None = None) -> None:
        """Map the ring behind ``descriptor``, or make a new one."""
        self.shape = shape
        self.descriptor = _make_file(shape.total_bytes) if descriptor is None else descriptor
        self._memory = mmap.mmap(self.descriptor, shape.total_bytes)
        whole = np.frombuffer(self._memory, dtype=np.uint8)
        flags_at = shape.pixel_bytes
        threads_at = flags_at + shape.flag_bytes
        tiles = (shape.slots, shape.batch_size)
        n_pixels = shape.slots * shape.batch_size * shape.tile_px**2 * 3
        self.pixels = whole[:n_pixels].reshape(*tiles, shape.tile_px, shape.tile_px, 3)
        self.flags = whole[flags_at : flags_at + shape.slots * shape.batch_size].reshape(tiles)
        beat_at = threads_at + shape.threads * 16
        self.at_work = whole[threads_at:beat_at].view(np.int64).reshape(shape.threads, 2)
        self.beat = whole[beat_at : beat_at + 8].view(np.int64)

    def close(self) -> None:
        """Close the file; the memory goes when the last array that shows it does."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _pages(n_bytes: int) -> int:
    return max(-(-n_bytes // _PAGE), 1) * _PAGE


def _make_file(n_bytes: int) -> int:
    """An open, unnamed file of that size."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("tessera-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, n_bytes)
    if hasattr(os, "memfd_create"):
        # a process that shortened the file would end the other one, which reads beyond its end
        fcntl.fcntl(descriptor, _ADD_SEALS, _SEAL_SEAL | _SEAL_SHRINK | _SEAL_GROW)
    return descriptor
