"""Two processes that write one store at the same moment: one commit of each unit, no loss, no error.

``make test-crash`` runs 1,000 races of each backend.
"""

import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from extract.store import find_format, open_store
from tests.conftest import REPOSITORY
from tests.test_extract.racer import KINDS, SLIDE
from tests.test_extract.seeded import (
    ENTRY,
    EXECUTION,
    FORMATS,
    flags_of,
    left_in,
    make_store,
    rows_of,
    tiles_of,
    wrong_features,
    wrong_tiles,
)
from tests.test_imports import HEAVY, loaded

RACES = int(os.environ.get("TESSERA_RACE_ROUNDS", "30"))
HEAD_START_S = 0.003


@pytest.fixture(scope="module")
def racers() -> Iterator[list[subprocess.Popen]]:
    """Two processes that are ready to race."""
    command = [sys.executable, "-m", "tests.test_extract.racer"]
    started = [
        subprocess.Popen([*command, variant], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for variant in "01"
    ]
    for racer in started:
        assert "ready" in racer.stdout.readline()
    yield started
    for racer in started:
        racer.communicate(timeout=60)
        assert racer.returncode == 0


def prepare(folder: Path, kind: str, backend: str) -> None:
    """The store as it lies before a race."""
    if kind == "new store":
        return
    store = make_store(folder, backend)
    if kind == "tiles":
        return
    store.write_tiles(tiles_of(SLIDE))
    if kind == "stale features":
        store.write_features(ENTRY, SLIDE, *rows_of(SLIDE, 2), EXECUTION)
        remove(next(path for path in (folder / "tiles").iterdir() if path.name != "zarr.json"))
        store.write_tiles(tiles_of(SLIDE, 1))
    if kind == "draft left behind":
        draft = store.draft(ENTRY, SLIDE, EXECUTION)
        draft.save(rows_of(SLIDE)[0][:7], rows_of(SLIDE)[1], flags_of(SLIDE)[:7])
        draft.release()


def remove(unit: Path) -> None:
    """Delete a unit."""
    shutil.rmtree(unit) if unit.is_dir() else unit.unlink()


def run(racers: list[subprocess.Popen], kind: str, folder: Path, backend: str, watched: bool) -> list[dict]:
    """Let both write, and read the store meanwhile if it is watched; what they answered."""
    line = {"kind": kind, "folder": str(folder), "backend": backend, "start": time.monotonic() + HEAD_START_S}
    for racer in racers:
        racer.stdin.write(json.dumps(line) + "\n")
        racer.stdin.flush()
    while watched and len(select.select([racer.stdout for racer in racers], [], [], 0)[0]) < 2:
        if find_format(folder) and ENTRY in open_store(folder).entries():
            variants(folder)
    return [json.loads(racer.stdout.readline()) for racer in racers]


def variants(folder: Path) -> dict[str, int]:
    """Of which writer the tiles and the features are that a reader accepts, whole and right; else an error."""
    store, found = open_store(folder), {}
    checks = {"tiles": (wrong_tiles, store.slide_ids()), "features": (wrong_features, store.slide_ids(ENTRY))}
    for name, (check, ids) in checks.items():
        if ids:
            wrong = [check(store, SLIDE, variant) for variant in (0, 1)]
            assert ids == [SLIDE]
            assert [] in wrong, wrong
            found[name] = wrong.index([])
    return found


@pytest.mark.timeout(120 + RACES)
@pytest.mark.parametrize("backend", FORMATS)
def test_two_writers_make_one_commit_of_each_unit(racers: list[subprocess.Popen], tmp_path: Path, backend: str):
    won, claimed = Counter[int](), Counter[str]()
    for number in range(RACES):
        kind = list(KINDS)[number % len(KINDS)]
        folder = tmp_path / str(number)
        prepare(folder, kind, backend)
        # a unit that is replaced may be gone while it is read
        watched = number % 4 == 1 and kind != "stale features"
        answers = run(racers, kind, folder, backend, watched)
        assert [answer["error"] for answer in answers] == [None, None], kind
        commits = {unit for answer in answers for unit in answer["commits"]}
        assert len(commits) == (2 if kind == "new store" else 1), (kind, answers)
        assert left_in(folder) == [], kind
        found = variants(folder)
        assert set(found) == ({"tiles"} if kind == "tiles" else {"tiles", "features"}), kind
        won[found.get("features", found["tiles"])] += 1
        claimed[kind] += any(answer["claimed"] for answer in answers)
        shutil.rmtree(folder)
    sys.stdout.write(f"{RACES} races of {backend}: won by {dict(won)}, found claimed {dict(claimed)}\n")
    # a race that the same one always wins is none
    assert min(won[0], won[1]) >= RACES // 15


def test_a_process_that_writes_a_store_starts_at_once():
    def seconds(statement: str) -> float:
        started = time.monotonic()
        subprocess.run([sys.executable, "-c", statement], cwd=REPOSITORY, check=True)
        return time.monotonic() - started

    # NumPy is most of it; what else the machine does at the moment is in both
    pairs = [(seconds("import extract.store"), seconds("import numpy")) for _ in range(3)]
    assert min(store for store, _ in pairs) - min(numpy for _, numpy in pairs) < 0.3
    assert loaded("import extract.store") & (HEAVY | {"torch", "zarr", "h5py", "hypothesis"}) == set()
