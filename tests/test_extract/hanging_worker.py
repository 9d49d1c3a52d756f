"""The process that reads files of other tools, in which their names say what they do to it; not a test by itself."""

import ctypes
import time
from pathlib import Path

import numpy as np

import extract.store.foreign.worker as worker
from extract.store.foreign.layouts.base import ForeignFile
from extract.store.foreign.layouts.clam import Clam

if __name__ == "__main__":
    look, read = worker.kind_of, Clam.read

    def looked(path: Path) -> str | None:
        """Look, or not."""
        if path.stem == "hang":
            time.sleep(3600)
        if path.stem == "segv":
            ctypes.string_at(0)
        if path.stem == "odd":
            raise KeyError("a surprise")
        return look(path)

    def slowly(self: Clam, file: ForeignFile, *arguments: object) -> object:
        """Read, or not."""
        if file.path.stem == "hang-later":
            time.sleep(3600)
        if file.path.stem == "greedy":
            _ = [np.ones(1 << 28) for _ in range(64)]
        return read(self, file, *arguments)  # type: ignore[arg-type]

    worker.kind_of = looked
    Clam.read = slowly  # type: ignore[method-assign,assignment]
    worker.main()
