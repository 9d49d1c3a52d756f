"""The log of one run: what became of each slide, one JSON line at a time."""

import json
import os
import re
import socket
import time
from collections.abc import Mapping
from typing import Any

from extract.store.core.files import clear_when_full
from extract.store.core.remote_path import StorePath, local_path


class RunLog:
    """One JSON line per slide of one run: outcome, reason, timings.

    Attributes:
        path: ``runs/<started>-<host>-<pid>.jsonl``.
    """

    def __init__(self, folder: StorePath) -> None:
        started = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())
        with clear_when_full(folder):
            folder.mkdir(exist_ok=True)
        self.path = folder / f"{started}-{host}-{os.getpid()}.jsonl"

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line and push it to the file."""
        path = local_path(self.path)
        with clear_when_full(path), open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text_of(line))

    def close(self) -> None:
        """End the log; every line is in the file already."""


def text_of(line: Mapping[str, Any]) -> str:
    """A line as it stands in a log."""
    return json.dumps(line, ensure_ascii=False) + "\n"
