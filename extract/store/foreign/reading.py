"""Files of other tools, read in a process that can be ended: a damaged one may hang, crash or bloat its library."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing import Pipe
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

import extract.errors
from extract.channel import Channel
from extract.errors import ForeignFileError
from extract.store.foreign.layouts import LAYOUTS
from extract.store.foreign.layouts.base import Answers, CutFacts, ForeignBag, ForeignFile, ForeignLayout

PATIENCE_S = 60.0
"""How long a file may take, beside what its size takes at `SLOWEST_BYTES_S`."""

SLOWEST_BYTES_S = 2e6
MEMORY_BYTES = 16 << 30


@dataclass(frozen=True)
class Looked:
    """What a file is.

    Attributes:
        kind: what its bytes are, as in `ForeignFile`; None where they are nothing that is read.
        layout: how it is laid out; None where that is not known.
        ids: its slides.
        labels: label by slide id.
    """

    kind: str | None
    layout: ForeignLayout | None = None
    ids: tuple[str, ...] = ()
    labels: Mapping[str, str] | None = None


class ForeignReader:
    """The process that reads, started when it is needed and again after it was ended.

    Example:
        >>> with ForeignReader() as reader:                                  # doctest: +SKIP
        ...     reader.look(Path("S1.h5"), "S1", None).layout.name
        'clam'
    """

    module = "extract.store.foreign.worker"
    """What the process runs."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def look(self, path: Path, name: str, layout: str | None) -> Looked:
        """What a file is.

        Args:
            path: the file.
            name: its path below the source without its extension.
            layout: the layout that is wanted; None for whatever it has.

        Raises:
            ForeignFileError: it is damaged, or can be several layouts.
        """
        answer, _ = self._ask(path, {"do": "look", "path": os.fspath(path), "name": name, "layout": layout})
        if answer.get("layout") is None:
            return Looked(None if answer["kind"] is None else str(answer["kind"]))
        labels = {str(key): str(label) for key, label in dict(answer["labels"]).items()}
        return Looked(str(answer["kind"]), LAYOUTS[int(answer["layout"])], tuple(map(str, answer["ids"])), labels)

    def read(self, file: ForeignFile, layout: ForeignLayout, slide_id: str, answers: Answers) -> ForeignBag:
        """One bag of a file.

        Raises:
            AmbiguousError: the file can be read in several ways; the message asks.
            ForeignFileError: the file is damaged, incomplete or not what its layout says.
        """
        # of the scales of all slides, this one's
        said = replace(answers, mpp=answers.mpp_of(slide_id), mpps={})
        request: dict[str, Any] = {"do": "read", "path": os.fspath(file.path), "name": file.name, "kind": file.kind}
        request |= {"layout": LAYOUTS.index(layout), "slide_id": slide_id, "answers": asdict(said)}
        answer, arrays = self._ask(file.path, request)
        features, *coords = (np.array(each) for each in arrays)
        return ForeignBag(
            slide_id,
            features,
            coords[0] if coords else None,
            CutFacts(**answer["cut"]),
            answer["tile_l0"],
            answer["mpp"],
            answer["backbone"],
            answer["attributes"],
        )

    def close(self) -> None:
        """End the process."""
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            self._process.kill()
            # one that hangs in the kernel ends when its disk answers
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=5)
        self._process = self._channel = None

    def _ask(self, path: Path, request: Mapping[str, Any]) -> tuple[dict[str, Any], list[np.ndarray]]:
        if self._channel is None:
            self._start()
        channel, process = self._channel, self._process
        if channel is None or process is None:
            raise ForeignFileError(f"got {path} → its reading process does not start → run mil doctor")
        limit = PATIENCE_S + _size(path) / SLOWEST_BYTES_S
        try:
            channel.send(request)
            if not channel.poll(limit):
                self.close()
                raise _not_read(path, f"it keeps its reader busy for more than {limit:.0f} s")
            answer, arrays = channel.receive()
        except (EOFError, OSError) as error:
            if isinstance(error, ForeignFileError):
                raise
            self.close()
            raise _not_read(path, f"it ends its reader (exit code {process.returncode})") from error
        except BaseException:
            # as Ctrl-C: what comes from there would be the answer to this question
            self.close()
            raise
        if "error" in answer:
            raise _rebuilt(path, answer["error"])
        return answer, arrays

    def _start(self) -> None:
        ours, theirs = Pipe()
        options = {"pipe": theirs.fileno(), "memory_bytes": MEMORY_BYTES}
        root = str(Path(__file__).parents[3])
        search = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            # -P: nothing is imported from the folder that the user happens to be in
            [sys.executable, "-P", "-m", self.module, json.dumps(options)],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            # Ctrl-C in a terminal is for the import, which ends its reader itself
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": search},
        )
        theirs.close()
        self._channel = Channel(ours)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _not_read(path: Path, why: str) -> ForeignFileError:
    return ForeignFileError(f"got {path} → {why} → it is damaged; copy it again or leave it out")


def _rebuilt(path: Path, error: Mapping[str, Any]) -> ForeignFileError:
    """The error that the reader described."""
    known = getattr(extract.errors, str(error["kind"]), None)
    if isinstance(known, type) and issubclass(known, extract.errors.SlideError):
        rebuilt = known(str(error["message"]))
        if isinstance(rebuilt, ForeignFileError):
            return rebuilt
        raise rebuilt
    return _not_read(path, f"it cannot be read ({error['message']})")
