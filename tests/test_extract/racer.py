"""One of two writers that race each other through many stores; not a test by itself.

Run as ``python -m tests.test_extract.racer VARIANT``. For every line of its input, a JSON object ``{kind, folder,
backend, start}``, it waits for the moment ``start`` (monotonic seconds, the same for all racers) and writes what the
kind of race is about, in its own variant. It answers with one JSON line: the units that it moved into place, whether
it found the slide claimed, and the error that escaped.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import zarr  # both loaded before the first race

from extract.errors import SlideClaimedError
from extract.store import Store
from tests.test_extract.seeded import (
    ENTRY,
    EXECUTION,
    SLIDES,
    flags_of,
    is_left,
    make_store,
    rows_of,
    tiles_of,
)

SLIDE = SLIDES[0]


def tiles(store: Store, variant: int) -> None:
    """Commit where the slide is cut."""
    store.write_tiles(tiles_of(SLIDE, variant))


def features(store: Store, variant: int) -> None:
    """Commit the slide's embeddings."""
    store.write_features(ENTRY, SLIDE, *rows_of(SLIDE, variant), EXECUTION)


def both(store: Store, variant: int) -> None:
    """Everything of a slide."""
    tiles(store, variant)
    features(store, variant)


def draft(store: Store, variant: int) -> None:
    """Claim the slide, save rows, commit, let go."""
    opened = store.draft(ENTRY, SLIDE, EXECUTION)
    rows, invalid = rows_of(SLIDE, variant)
    opened.save(rows[:10], invalid, flags_of(SLIDE)[:10])
    features(store, variant)
    opened.discard()


# what each kind of race is about; the parent prepares the store for it
KINDS: dict[str, Callable[[Store, int], None]] = {
    "new store": both,
    "tiles": tiles,
    "features": features,
    "stale features": features,
    "draft": draft,
    "draft left behind": draft,
}


def watch_commits() -> list[str]:
    """A list that gets every unit that this process moves into place: its name, and which file or folder it is."""
    moved: list[str] = []

    def watched(move: Callable[..., None]) -> Callable[..., None]:
        def run(source: str | Path, target: str | Path) -> None:
            # a unit that was taken out by mistake and put back is one commit
            stat = os.stat(source)
            move(source, target)
            path = Path(target)
            if path.name not in ("zarr.json", "entry.json", "tessera.json") and not is_left(path):
                moved.append(f"{path.parent.name}/{path.name} {stat.st_ino} {stat.st_mtime_ns}")

        return run

    for name in ("rename", "replace", "link"):
        setattr(os, name, watched(getattr(os, name)))
    return moved


def race(kind: str, folder: str, backend: str, start: float, variant: int) -> dict[str, object]:
    """Run one race; nothing escapes unreported."""
    result: dict[str, object] = {"claimed": False, "error": None}
    while time.monotonic() < start:
        pass
    try:
        KINDS[kind](make_store(Path(folder), backend), variant)
    except SlideClaimedError:
        result["claimed"] = True
    except Exception as error:
        result["error"] = repr(error)
    return result


def main(variant: int) -> None:
    """Take part in every race that is announced."""
    moved = watch_commits()
    sys.stdout.write(json.dumps({"ready": [zarr.__version__, h5py.__version__]}) + "\n")
    sys.stdout.flush()
    for line in sys.stdin:
        moved.clear()
        result = race(**json.loads(line), variant=variant)
        sys.stdout.write(json.dumps({**result, "commits": moved}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
