"""What a command is at: said as soon as it is known, and again every ten seconds until something else is printed.

Everything goes to stderr, in plain lines. Imports nothing that takes time: the first line comes before all that does.
"""

import sys
import threading
import time
from collections.abc import Callable

EVERY_S = 10.0
_LOOK_S = 0.25

FIRST = {
    "plan": "looking for slides and what the store holds of them",
    "extract": "looking for slides and what the store holds of them",
    "sheet": "reading the store",
    "doctor": "checking the installation",
    "train": "reading settings, labels and store, loading torch",
    "benchmark": "reading settings, labels and stores, loading torch",
    "sweep": "reading settings, labels and store, loading torch",
    "compare": "reading the runs",
    "score": "reading the runs",
    "ensemble": "reading the runs",
    "pack": "reading the run",
    "predict": "reading the model and the store, loading torch",
    "evaluate": "reading the model, labels and the store, loading torch",
    "export-onnx": "reading the model, loading torch",
    "report": "reading the run",
    "demo": "drawing slides",
    "store ls": "reading the store",
    "store verify": "reading the store",
    "store repair": "reading the store",
    "store convert": "reading the store",
    "store import": "looking into the files",
    "store export": "reading the store",
    "models pull": "looking for the weights",
    "models verify": "loading torch and the backbone",
}
"""What a command is at when it has begun; a command that is not here is done in a moment."""


class Activity:
    """What is being done, for whoever waits; there is one, `ACTIVITY`."""

    def __init__(self) -> None:
        self._what = ""
        self._since = self._printed = 0.0
        self._repeat: Callable[[], None] | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, arguments: list[str]) -> None:
        """Say what the command of these arguments is at, and go on saying so until `end`."""
        if {"--help", "-h", "--version"} & set(arguments):
            return
        names = [argument for argument in arguments if not argument.startswith("-")]
        what = FIRST.get(" ".join(names[:2])) or FIRST.get("".join(names[:1]))
        if what is None:
            return
        self.at(what)
        self._ended.clear()
        self._thread = threading.Thread(target=self._repeat_it, name="activity", daemon=True)
        self._thread.start()

    def at(self, what: str) -> None:
        """Something else is done now; said unless it was just said."""
        if what == self._what:
            return
        self._what, self._since, self._repeat = what, time.monotonic(), None
        self._print(f"{what} ...")

    def follow(self, repeat: Callable[[], None] | None) -> None:
        """Something else shows how far it is: it is called when it was silent for long; None shows it by itself."""
        self._what, self._repeat = "", repeat
        self.printed()

    def rest(self, what: str) -> None:
        """Something is done that may well be short: it is said only if it is not."""
        self._what, self._since, self._repeat = what, time.monotonic(), None
        self.printed()

    def printed(self) -> None:
        """Something was printed: what is done need not be said again for a while."""
        self._printed = time.monotonic()

    def end(self) -> None:
        """Say nothing any more."""
        self._what, self._repeat = "", None
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _repeat_it(self) -> None:
        while not self._ended.wait(_LOOK_S):
            if time.monotonic() - self._printed < EVERY_S:
                continue
            if self._repeat is not None:
                self._repeat()
            elif self._what:
                self._print(f"{self._what} ... {time.monotonic() - self._since:.0f} s")
            self.printed()

    def _print(self, line: str) -> None:
        self.printed()
        try:
            print(line, file=sys.stderr, flush=True)
        except (OSError, ValueError):
            # nobody listens any more
            return


ACTIVITY = Activity()
