"""Signals that end a command: Ctrl-C, SIGTERM, and SIGHUP, which a terminal sends when it is closed."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end a command once what is under way is safe."""


def exit_when_stopped() -> None:
    """Let SIGTERM and SIGHUP end this process as an error would: what it has begun is cleared away.

    A signal that is ignored, as SIGHUP is under nohup, or handled already, is left as it is.
    """
    terminals = _terminals()

    def leave(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _silence(terminals)
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, leave)


@contextmanager
def stopping(stop: threading.Event, at_once: Callable[[], None]) -> Iterator[None]:
    """Within it, the first signal sets ``stop``; a second one ends the process without a farewell.

    Args:
        stop: is set by the first signal.
        at_once: called before the process ends by the second one, as to end its children.
    """
    terminals = _terminals()

    def first(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            at_once()
            os._exit(128 + number)
        stop.set()
        if number == signal.SIGHUP:
            _silence(terminals)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # under nohup a terminal may close
    numbers = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, first) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _terminals() -> list[int]:
    """Which of stdout and stderr are a terminal."""
    return [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]


def _silence(terminals: list[int]) -> None:
    """What is said to a terminal that is gone has nobody to hear it, and must not be an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in terminals:
        os.dup2(nowhere, descriptor)
