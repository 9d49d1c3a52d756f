"""Writes a store in a child process, over and over, and kills it; not a test by itself.

    python -m tests.test_extract.crash_store random FOLDER BACKEND KILLS SEED    at random moments
    python -m tests.test_extract.crash_store steps FOLDER BACKEND STRIDE         before every STRIDE-th step

The parent imports everything once and forks, so that a round costs milliseconds. A step is whatever the interpreter
reports of the store's files: a file opened, a folder made, something renamed or removed. Killing before each step in
turn covers everything that can lie on the disk between two of them. It prints one JSON line: how many kills hit a
writer at work, what lay in the store after them, and what was wrong.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from fnmatch import fnmatch
from itertools import count
from pathlib import Path

import h5py
import zarr  # both imported once, before the forks: that takes longer than a round

from extract.errors import ExtractError
from extract.store import Store, open_store
from tests.test_extract.seeded import (
    ENTRY,
    EXECUTION,
    SLIDES,
    files_of,
    flags_of,
    left_in,
    make_store,
    rows_of,
    tiles_of,
    wrong_units,
)

STEPS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate", "os.utime"}
LEFT = {
    "a partial of features": "features/*.partial*",
    "a partial of tiles": "tiles/*.partial*",
    "a partial of metadata": "*.partial",
    "saved rows": "*.rows",
    "a draft": "*.draft",
}
DRAFT_IS_WRONG = 3


def write(folder: Path, backend: str, slides: tuple[str, ...] = SLIDES) -> None:
    """Write every unit that is not there, as extraction does: tiles, rows saved in a draft, features."""
    store = make_store(folder, backend)
    for slide_id in slides:
        if slide_id not in store:
            store.write_tiles(tiles_of(slide_id))
        if store.has_features(slide_id, ENTRY):
            store.clear_draft(slide_id, ENTRY)
        else:
            write_features(store, slide_id)


def write_features(store: Store, slide_id: str) -> None:
    """Save rows in two steps, go on with those that an earlier life saved, commit."""
    features, invalid = rows_of(slide_id)
    draft = store.draft(ENTRY, slide_id, EXECUTION)
    saved = len(draft.features)
    if draft.features.tobytes() != features[:saved].tobytes():
        os._exit(DRAFT_IS_WRONG)
    if draft.invalid_rows != [row for row in invalid if row < saved]:
        os._exit(DRAFT_IS_WRONG)
    try:
        for stop in (len(features) // 3, len(features) * 2 // 3):
            draft.save(features[:stop], invalid, flags_of(slide_id)[:stop])
        store.write_features(ENTRY, slide_id, features, invalid, EXECUTION)
    except ExtractError:
        draft.release()
        raise
    draft.discard()


def live(folder: Path, backend: str, slides: tuple[str, ...] = SLIDES, step: int | None = None) -> int:
    """Start a writer, which kills itself before the given step of its work; returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        if step is not None:
            die_before(step, os.fspath(folder))
        write(folder, backend, slides)
        code = 0
    finally:
        os._exit(code)


def die_before(step: int, folder: str) -> None:
    """Kill this process before its ``step``-th step on the files in ``folder``, from 0."""
    left = step

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event in STEPS and isinstance(arguments[0], str | os.PathLike):
            if not os.fspath(arguments[0]).startswith(folder):
                return
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(watch)


def ended(child: int, after: float | None = None) -> bool:
    """Kill a writer after a while, or let it end; True if it was killed before its end."""
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise SystemExit(f"a writer ended with {os.WEXITSTATUS(status)}")
    return os.WIFSIGNALED(status)


def free_drafts(folder: Path) -> None:
    """Let two minutes pass for a draft without a header: its lease is all that says whether its worker lives."""
    for path in folder.rglob("~*.draft"):
        if not path.stat().st_size:
            os.utime(path, (0, 0))


def found_after(folder: Path) -> tuple[str, list[str]]:
    """What a kill left behind, and what of the units that a reader accepts is wrong."""
    place = next((kind for kind in LEFT if any(fnmatch(name, LEFT[kind]) for name in left_in(folder))), "nothing")
    free_drafts(folder)
    if not any((folder / name).is_file() for name in ("zarr.json", "tessera.json")):
        return "no store", []
    try:
        return place, wrong_units(open_store(folder))
    except Exception as error:
        return place, [f"a reader got {error!r}"]


def compared(folder: Path, expected: dict[str, bytes]) -> list[str]:
    """In what a store differs from one that was written without interruption."""
    files = files_of(folder)
    names = sorted(name for name in files.keys() | expected.keys() if files.get(name) != expected.get(name))
    left = [name for name in left_in(folder) if ".partial" not in name]
    return [f"{name} differs" for name in names] + [f"{name} is left" for name in left]


def seconds_of_a_life(folder: Path, backend: str) -> float:
    """How long a writer takes from the first unit to the last."""
    started = time.monotonic()
    ended(live(folder, backend))
    return time.monotonic() - started


def kill_at_random(folder: Path, backend: str, kills: int, seed: int) -> dict[str, object]:
    """Kill writers at random moments of their work until so many were hit; every store is finished and compared."""
    rng = random.Random(seed)
    ended(live(folder / "whole", backend))
    duration = min(seconds_of_a_life(folder / f"timed {number}", backend) for number in range(3))
    expected, wrong, places, hits, number = files_of(folder / "whole"), [], Counter[str](), 0, 0
    while hits < kills:
        store = folder / f"store {number}"
        # a life that is cut short leaves less to do for the next one, which may come to its end
        if ended(live(store, backend), rng.uniform(0, duration)):
            hits += 1
            place, faults = found_after(store)
            places[place] += 1
            wrong += [f"kill {hits}: {what}" for what in faults]
        else:
            wrong += [f"store {number}: {what}" for what in compared(store, expected)]
            shutil.rmtree(store)
            number += 1
    ended(live(folder / f"store {number}", backend))
    wrong += [f"store {number}: {what}" for what in compared(folder / f"store {number}", expected)]
    return {"hits": hits, "stores": number + 1, "seconds_a_life": duration, "places": places, "wrong": wrong}


def kill_at_steps(folder: Path, backend: str, stride: int) -> dict[str, object]:
    """Kill a writer before its steps 0, ``stride``, ... until it comes to its end; finish and compare every store.

    Then the same once more for a writer that goes on with rows which an earlier one had saved.
    """
    slides, wrong, places, hits = SLIDES[:1], [], Counter[str](), 0
    ended(live(folder / "whole", backend, slides))
    expected = files_of(folder / "whole")
    for begun in (None, saved_rows(folder / "begun", backend, slides)):
        for step in count(0, stride):
            store = folder / f"{'new' if begun is None else 'begun'} {step}"
            if begun is not None:
                shutil.copytree(begun, store)
            if not ended(live(store, backend, slides, step)):
                break
            place, faults = found_after(store)
            ended(live(store, backend, slides))
            hits, places[place] = hits + 1, places[place] + 1
            wrong += [f"{store.name}: {what}" for what in (*faults, *compared(store, expected))]
            shutil.rmtree(store)
    return {"hits": hits, "places": places, "wrong": wrong}


def saved_rows(folder: Path, backend: str, slides: tuple[str, ...]) -> Path:
    """A store whose writer died after it had saved rows of its last slide."""
    child = os.fork()
    if not child:
        type(make_store(folder, backend)).write_features = die
        write(folder, backend, slides)
    ended(child)
    return folder


def die(*_: object) -> None:
    """Be killed here."""
    os.kill(os.getpid(), signal.SIGKILL)


def main(mode: str, folder: Path, backend: str, *numbers: int) -> None:
    """Print what came of it as one JSON line."""
    kill = {"random": kill_at_random, "steps": kill_at_steps}[mode]
    versions = {"zarr": zarr.__version__, "h5py": h5py.__version__}
    print(json.dumps({"mode": mode, "backend": backend, **versions, **kill(folder, backend, *numbers)}))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:]))
