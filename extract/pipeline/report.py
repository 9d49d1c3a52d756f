"""What an extraction tells while it goes on, and at its end."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from extract.folders import NotTaken
from extract.pipeline.jobs import StreamStats
from extract.store.core.remote_path import StorePath


@dataclass(frozen=True)
class SlideOutcome:
    """What became of one slide.

    Attributes:
        slide_id: its id.
        path: the file.
        outcome: ``embedded``, ``complete`` (it was there already), ``elsewhere`` (another process is at work on it) or
            ``failed``.
        reason: why it failed or is left to another, and what to do; empty otherwise.
        n_tiles: tiles on tissue, invalid ones included.
        n_invalid: tiles that could not be decoded.
        n_resumed: tiles that an earlier run had saved.
        flagged: how many tiles are blurred, empty or pen.
        mpp: µm/px of its tiles, and where the native mpp came from.
        reader: how its tiles were read: ``direct``, ``openslide`` or ``image``, and why where it is not the fastest.
        seconds: from opening to commit.
    """

    slide_id: str
    path: str
    outcome: str
    reason: str = ""
    n_tiles: int = 0
    n_invalid: int = 0
    n_resumed: int = 0
    flagged: dict[str, int] = field(default_factory=dict)
    reader: str = ""
    mpp: dict[str, Any] | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class ExtractionReport:
    """What became of a run.

    Attributes:
        store: path of the store.
        entry: the features entry; the first one, where there are several.
        entries: all features entries of the run.
        outcomes: one per slide, sorted by id.
        stats: where the time went.
        seconds: wall time of the run.
        log: the run's JSON lines. It is gone with the store where no slide could be cut into a new one.
        not_taken: the files of given folders that are no slides, counted by their reason.
    """

    store: StorePath
    entry: str
    entries: tuple[str, ...]
    outcomes: tuple[SlideOutcome, ...]
    stats: StreamStats
    seconds: float
    log: StorePath
    not_taken: NotTaken = field(default_factory=NotTaken)

    @property
    def failed(self) -> tuple[SlideOutcome, ...]:
        """The slides that failed."""
        return tuple(outcome for outcome in self.outcomes if outcome.outcome == "failed")

    def count(self, outcome: str) -> int:
        """How many slides ended as ``embedded``, ``complete``, ``elsewhere`` or ``failed``."""
        return sum(o.outcome == outcome for o in self.outcomes)


class Progress(Protocol):
    """What a run tells while it goes on; called from several threads."""

    def start(self, n_slides: int) -> None:
        """The run begins."""

    def at(self, what: str) -> None:
        """What is being done until the first slide is open: ``loading the backbone``."""

    def tiles_done(self, n: int, stats: StreamStats) -> None:
        """``n`` more tiles are embedded; ``stats`` tells how busy the device is and which stage the others wait for."""

    def slide_done(self, outcome: SlideOutcome) -> None:
        """A slide is finished."""

    def warn(self, text: str) -> None:
        """Something that the user should know and that stops nothing."""


class Silent:
    """A `Progress` that says nothing."""

    def start(self, n_slides: int) -> None:
        """Nothing."""

    def at(self, what: str) -> None:
        """Nothing."""

    def tiles_done(self, n: int, stats: StreamStats) -> None:
        """Nothing."""

    def slide_done(self, outcome: SlideOutcome) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """Nothing."""


def tell(progress: Progress, what: str) -> None:
    """Say what is being done to a `Progress` that wants to know; those of before version 0.2 do not."""
    at = getattr(progress, "at", None)
    if at is not None:
        at(what)
