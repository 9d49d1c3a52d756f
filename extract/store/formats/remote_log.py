"""The log of a run at a URL, where nothing can be appended to."""

import atexit
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from extract.errors import StoreUnreachableError
from extract.store.core.remote_path import RemotePath
from extract.store.core.run_log import RunLog, text_of

_FLUSH_S = 30.0


class RemoteRunLog(RunLog):
    """One JSON line per slide of one run, one object, written whole at most every 30 s and at the end.

    A process that is killed loses the lines of its last 30 s; what the store holds does not depend on them.
    """

    def __init__(self, folder: RemotePath) -> None:
        super().__init__(folder)
        self._lines: list[str] = []
        self._written, self._at = 0, 0.0
        atexit.register(self._close_quietly)

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line."""
        self._lines.append(text_of(line))
        if time.monotonic() - self._at >= _FLUSH_S:
            self._flush()

    def close(self) -> None:
        """Write what is not yet written."""
        self._flush()
        atexit.unregister(self._close_quietly)

    def _flush(self) -> None:
        lines = list(self._lines)
        if len(lines) > self._written:
            self.path.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
            self._written = len(lines)
        self._at = time.monotonic()

    def _close_quietly(self) -> None:
        # the interpreter ends, with its threads: whatever fails now has nobody to tell
        with suppress(StoreUnreachableError, RuntimeError):
            self._flush()
