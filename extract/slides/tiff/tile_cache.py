"""Decoded source tiles that were read a moment ago, within a bound of memory."""

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock

import numpy as np


class TileCache:
    """Decoded source tiles, the least recently used dropped first; several threads decode a tile once."""

    def __init__(self, limit_bytes: int) -> None:
        """Keep at most ``limit_bytes``; 0 keeps nothing."""
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self._tiles: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()
        self._lock = Lock()
        self._making = [Lock() for _ in range(64)]

    def get(self, key: tuple[int, int, int], make: Callable[[], np.ndarray]) -> np.ndarray:
        """The tile of ``key``, made if it is not held; it must not be written to."""
        found = self._find(key)
        if found is None:
            with self._making[hash(key) % len(self._making)]:
                found = self._find(key)
                if found is None:
                    found = make()
                    self._hold(key, found)
        return found

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._tiles.clear()
            self.held_bytes = 0

    def _find(self, key: tuple[int, int, int]) -> np.ndarray | None:
        with self._lock:
            if key in self._tiles:
                self._tiles.move_to_end(key)
            return self._tiles.get(key)

    def _hold(self, key: tuple[int, int, int], tile: np.ndarray) -> None:
        with self._lock:
            self._tiles[key] = tile
            self.held_bytes += tile.nbytes
            while self.held_bytes > self.limit_bytes:
                self.held_bytes -= self._tiles.popitem(last=False)[1].nbytes
