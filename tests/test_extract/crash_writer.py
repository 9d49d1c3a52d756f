"""Writes a store in a child process, over and over, and kills it at random moments; not a test by itself.

Run as ``python -m tests.test_extract.crash_writer FOLDER ROUNDS SEED``. The parent imports everything once and forks,
so that a round costs milliseconds. It prints one JSON line: kills that hit a writer at work, those within a unit, and
what went wrong.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import zarr  # imported once, before the forks: it takes longer than a round

from extract.store import Execution, FeatureRecipe, TileRecipe, TilesUnit, TransformRecipe, open_store
from extract.store.fingerprint import sha256_of
from extract.store.zarr_store import ZarrStore

SLIDES = [f"site {i % 2}/slide {i}" for i in range(6)]
EXECUTION = Execution("fp32", "torch", "cpu", 4, {"torch": "2"})
RECIPE = FeatureRecipe(
    "tiny", "tiny", "1", "0" * 64, "model", TransformRecipe(64, "bicubic", (0.5,) * 3, (0.5,) * 3), dim=64
)


def write(folder: Path) -> None:
    """Write every unit that is not there, as extraction does."""
    store = ZarrStore.create(folder, TileRecipe())
    store.create_entry("tiny", RECIPE)
    for number, slide_id in enumerate(SLIDES):
        rng = np.random.default_rng(number)
        n = 300 + number
        coords = rng.integers(0, 1 << 20, (n, 2), dtype=np.int32)
        fraction, features = rng.random(n, dtype=np.float32), rng.normal(size=(n, 64)).astype(np.float16)
        thumbnail = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        if slide_id not in store:
            store.write_tiles(TilesUnit(slide_id, coords, fraction, thumbnail, {"mpp": 0.5}))
        if not store.has_features(slide_id, "tiny"):
            store.write_features("tiny", slide_id, features, [number], EXECUTION)


def check(folder: Path) -> list[str]:
    """What of the accepted units is not whole."""
    wrong: list[str] = []
    store = open_store(folder)
    for slide_id in store.slide_ids():
        slide = store[slide_id]
        hashes = slide.record["sha256"]
        for name, array in (
            ("coords", slide.coords()),
            ("tissue_fraction", slide.tissue_fraction),
            ("thumbnail", slide.thumbnail),
        ):
            if sha256_of(np.ascontiguousarray(array)) != hashes[name]:
                wrong.append(f"{slide_id} {name}")
    for slide_id in store.slide_ids("tiny"):
        record = store[slide_id].feature_record("tiny")
        if sha256_of(np.ascontiguousarray(store[slide_id]._all_features("tiny"))) != record["sha256"]:
            wrong.append(f"{slide_id} features")
    return wrong


def run(folder: Path, kill_after: float | None) -> bool:
    """Write in a child; True if it was killed before it had ended."""
    child = os.fork()
    if child == 0:
        try:
            write(folder)
        finally:
            os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def files(folder: Path) -> dict[str, bytes]:
    """Every file of the store but half-built units."""
    found = (path for path in folder.rglob("*") if path.is_file() and ".partial" not in str(path))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def main(folder: Path, rounds: int, seed: int) -> None:
    """Kill ``rounds`` writers, three per store, and compare every store with an uninterrupted one."""
    rng = random.Random(seed)
    run(folder / "warm", None)
    started = time.monotonic()
    run(folder / "whole", None)
    duration = time.monotonic() - started
    expected, wrong, hits, partials = files(folder / "whole"), [], 0, 0
    for number in range(-(-rounds // 3)):
        store = folder / f"store {number}"
        ZarrStore.create(store, TileRecipe()).create_entry("tiny", RECIPE)
        for part in (0.9, 0.6, 0.4):
            hits += run(store, rng.uniform(0, part * duration))
            partials += any(".partial" in name for name in map(str, store.rglob("*")))
            wrong += [f"store {number}: {what}" for what in check(store)]
        run(store, None)
        if files(store) != expected:
            wrong.append(f"store {number}: not byte-identical to an uninterrupted one")
    print(json.dumps({"zarr": zarr.__version__, "hits": hits, "partials": partials, "wrong": wrong}))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
