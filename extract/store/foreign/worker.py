"""The process that reads files of other tools: ``python -m extract.store.foreign.worker``; it may hang, crash or bloat.

Strangers' files are read here and nowhere else. Answers are JSON and plain arrays.
"""

import json
import os
import signal
import sys
import traceback
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from extract.channel import Channel
from extract.errors import AmbiguousError, ExtractError
from extract.store.foreign.layouts import LAYOUTS
from extract.store.foreign.layouts.base import MAYBE, NO, SURE, Answers, ForeignBag, ForeignFile, ForeignLayout
from extract.store.foreign.layouts.matrices import is_tensor_file
from extract.store.foreign.layouts.slideflow import INDEX_SUFFIX

_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"

Answer = tuple[dict[str, Any], list[np.ndarray]]


def look(request: dict[str, Any]) -> Answer:
    """What a file is: its kind, and where it has a layout the number of that, its slides and their labels."""
    path = Path(request["path"])
    kind = kind_of(path)
    if kind is None:
        return {"kind": None}, []
    file = ForeignFile(path, request["name"], kind)
    layout = layout_of(file, request["layout"])
    if layout is None:
        return {"kind": kind, "layout": None}, []
    answer = {"layout": LAYOUTS.index(layout), "ids": layout.slide_ids(file), "labels": layout.labels(file)}
    return {"kind": kind} | answer, []


def read(request: dict[str, Any]) -> Answer:
    """One bag."""
    file = ForeignFile(Path(request["path"]), request["name"], request["kind"])
    bag = LAYOUTS[request["layout"]].read(file, request["slide_id"], Answers(**request["answers"]))
    return _plain(bag), [bag.features, *([] if bag.coords is None else [bag.coords])]


def _plain(bag: ForeignBag) -> dict[str, Any]:
    return {
        "cut": asdict(bag.cut),
        "tile_l0": bag.tile_l0,
        "mpp": bag.mpp,
        "backbone": bag.backbone,
        "attributes": dict(bag.attributes),
    }


def kind_of(path: Path) -> str | None:
    """What the bytes of a file are."""
    if path.is_dir():
        return "zarr"
    with open(path, "rb") as file:
        head = file.read(8)
    if head == _HDF5_SIGNATURE:
        return "h5"
    if is_tensor_file(path):
        return "pt"
    if head.startswith(b"PK"):
        return "npz" if _is_npz(path) and not path.name.endswith(INDEX_SUFFIX) else None
    return "csv" if path.suffix.lower() == ".csv" else None


def _is_npz(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False
    return bool(names) and all(name.endswith(".npy") for name in names)


def layout_of(file: ForeignFile, wanted: str | None) -> ForeignLayout | None:
    """The layout of a file, or None when it has none.

    Raises:
        AmbiguousError: it can be several.
    """
    fits = {layout: layout.fits(file) for layout in LAYOUTS if layout.kind == file.kind}
    if wanted is not None:
        return next((layout for layout, fit in fits.items() if layout.name == wanted and fit != NO), None)
    sure = [layout for layout, fit in fits.items() if fit == SURE]
    if len(sure) > 1:
        raise AmbiguousError(
            f"got {file.path} → it can be {' or '.join(layout.name for layout in sure)} → which? → add --layout"
        )
    if sure:
        return sure[0]
    maybe = [layout for layout, fit in fits.items() if fit == MAYBE]
    # a file that several could be is none of them for sure: it is read as one that names no tool
    return maybe[-1] if maybe else None


def answer(request: dict[str, Any]) -> Answer:
    """The answer to a request; whatever a file does to its reader, short of ending it, is one."""
    work: dict[str, Callable[[dict[str, Any]], Answer]] = {"look": look, "read": read}
    try:
        return work[request["do"]](request)
    except ExtractError as error:
        return {"error": {"kind": type(error).__name__, "message": str(error)}}, []
    except Exception as error:  # noqa: BLE001  a damaged file raises what it likes
        last = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return {"error": {"kind": "", "message": message, "at": f"{last.name}"}}, []


def main() -> None:
    """Serve until the other end is closed."""
    options = json.loads(sys.argv[1])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (options["memory_bytes"], options["memory_bytes"]))
    channel = Channel(Connection(options["pipe"]))
    while True:
        try:
            request, _ = channel.receive()
            channel.send(*answer(request))
        except (EOFError, OSError):
            os._exit(0)


if __name__ == "__main__":
    main()
