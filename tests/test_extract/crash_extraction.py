"""Extracts in a child process and kills it at random moments; not a test by itself.

Run as ``python -m tests.test_extract.crash_extraction SLIDES FOLDER ROUNDS SEED``. The parent imports everything once
and forks. The first child runs to its end in ``FOLDER/whole``. Then children are killed in ``FOLDER/killed-0`` and,
once that is complete, in the next; the last child in each runs to its end. It prints one JSON line: how many kills hit.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import timm
import zarr

import extract.pipeline.stream
from extract.pipeline.extraction import run_extraction
from tests.test_extract.small import TILES, tiny_backbone


def start(slides: Path, store: Path) -> int:
    """Extract in a child; returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        code = 2 if run_extraction(slides, store, tiny_backbone(), recipe=TILES, runtime="torch").failed else 0
    finally:
        os._exit(code)


def finish(child: int) -> bool:
    """Wait for a child; True if it was killed before its end."""
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise SystemExit(f"the child ended with {os.WEXITSTATUS(status)}")
    return os.WIFSIGNALED(status)


def committed(store: Path) -> int:
    """Units at their final place."""
    units = [*store.glob("tiles/*/zarr.json"), *store.glob("features/*/*/zarr.json")]
    return sum(".partial" not in str(unit) for unit in units)


def kill_at(child: int, store: Path, units: int, delay: float) -> bool:
    """Kill a child a moment after so many units are committed; True if it had not ended."""
    while committed(store) < units and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    return finish(child)


def main(slides: Path, folder: Path, rounds: int, seed: int) -> None:
    """One uninterrupted store, and others whose writers were killed ``rounds`` times in all."""
    # after every batch, so that kills hit drafts too
    extract.pipeline.jobs.SAVE_EVERY_S = 0.0
    rng, hits, number = random.Random(seed), 0, 0
    finish(start(slides, folder / "whole"))
    for _ in range(rounds):
        store = folder / f"killed-{number}"
        child = start(slides, store)
        if kill_at(child, store, committed(store) + rng.randint(1, 3), rng.uniform(0, 0.02)):
            hits += 1
        else:
            number += 1
    for store in folder.glob("killed-*"):
        finish(start(slides, store))
    print(json.dumps({"hits": hits, "versions": [timm.__version__, zarr.__version__]}))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
