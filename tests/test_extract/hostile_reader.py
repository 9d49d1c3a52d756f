"""The reading process, in which the names of files say what they do to their decoder; not a test by itself.

segv-1-4     rows 1 and 4 end the process with a signal, whenever they are read
hang-2       row 2 never ends
greedy-0     row 0 takes all the memory it gets
cut-segv     the slide cannot even be opened
cut-hang     opening it never ends
"""

import ctypes
import time

import numpy as np

import extract.reading.reader
import extract.slides.opening
from extract.slides.slide import Slide


class HostileSlide(Slide):
    """A slide that does what its name says."""

    def __init__(self, *arguments: object, **keywords: object) -> None:
        super().__init__(*arguments, **keywords)  # type: ignore[arg-type]
        self._what, *rows = self.path.stem.split("-")
        if self._what in ("cut", "slow"):
            _act(rows[0])
        self._corners = {(int(row) * 64, 0) for row in rows if row.isdigit()}

    def read_tile(self, x_l0: int, y_l0: int, plan: object, **keywords: object) -> np.ndarray:
        """Read, or not."""
        if (x_l0, y_l0) in self._corners:
            _act(self._what)
        return super().read_tile(x_l0, y_l0, plan, **keywords)  # type: ignore[arg-type]


def _act(what: str) -> None:
    if what == "segv":
        # a real one: a signal that is sent would let this thread go on for a while
        ctypes.string_at(0)
    if what == "hang":
        time.sleep(3600)
    if what == "cut":
        time.sleep(1)
    if what == "greedy":
        _ = [np.empty(1 << 27) for _ in range(64)]


def open_hostile(path: object, name: object = None, reader: str = "auto") -> Slide:
    """Open a slide by its name."""
    if str(path).rpartition("/")[2].split("-")[0] in ("segv", "hang", "greedy", "cut", "slow"):
        return HostileSlide(path, name)
    return extract.slides.opening.open_slide(path, name, reader)  # type: ignore[arg-type,return-value]


if __name__ == "__main__":
    extract.reading.reader.open_slide = open_hostile  # type: ignore[assignment]
    extract.reading.reader.main()
