"""Damaged stores: a flipped byte or a cut-off end, in any file of any unit, is found; nothing wrong is handed out.

``make test-crash`` flips a bit of every byte of a Zarr store, and of every third of an HDF5 store.
"""

import os
import random
import sys
from collections import Counter
from pathlib import Path

import pytest

from extract.errors import ExtractError
from extract.store import Store, open_store
from extract.store.upkeep.verify import verify_store
from tests.test_extract.crash_store import write
from tests.test_extract.seeded import ENTRY, FORMATS, SLIDES

FLIPS = 6000 if int(os.environ.get("TESSERA_CRASH_ROUNDS", "0")) >= 1000 else 250


def content(folder: Path) -> dict[str, object]:
    """Everything that a reader of the store can get."""
    store = open_store(folder)
    found: dict[str, object] = {"recipes": (store.tile_recipe, {e: store.feature_recipe(e) for e in store.entries()})}
    for slide_id in store.slide_ids():
        slide = store[slide_id]
        arrays = (slide.coords(), slide.tissue_fraction, slide.thumbnail, slide.tissue_mask)
        found[slide_id] = [slide.record, *((array.dtype, array.shape, array.tobytes()) for array in arrays)]
    for slide_id in store.slide_ids(ENTRY):
        slide = store[slide_id]
        arrays = (slide.features(ENTRY), slide.coords(ENTRY), slide.valid(ENTRY))
        record = slide.feature_record(ENTRY)
        found[f"{slide_id} {ENTRY}"] = [record, *((array.dtype, array.shape, array.tobytes()) for array in arrays)]
    return found


def verdict(folder: Path, expected: dict[str, object]) -> str:
    """What becomes of a store that was changed: found, harmless (every value is as it was), unseen, or a surprise."""
    try:
        if verify_store(open_store(folder), workers=1):
            return "found"
        return "harmless" if content(folder) == expected else "unseen"
    except ExtractError:
        return "found"
    except Exception as error:
        return f"{type(error).__name__} escapes: {error}"


def reads_alone(store: Store) -> bool:
    """Whether the readers' own checks find nothing."""
    try:
        for slide_id in SLIDES[:1]:
            store[slide_id].verify_tiles()
            store[slide_id].verify_features(ENTRY)
    except ExtractError:
        return True
    return False


def unit_files(folder: Path) -> list[Path]:
    """Every file of a store but run logs."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and "runs" not in path.parts)


def places(size: int, stride: int, seed: int) -> range:
    """Bytes of a file to flip: every ``stride``-th, from a random one on."""
    return range(random.Random(seed).randrange(stride), size, stride)


@pytest.fixture(scope="module", params=FORMATS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of one slide."""
    folder = tmp_path_factory.mktemp("damage") / "s"
    write(folder, request.param, SLIDES[:1])
    return folder


@pytest.mark.timeout(1800, method="thread")
def test_a_flipped_bit_anywhere_is_found_or_changes_nothing(folder: Path):
    expected, unseen, seen = content(folder), [], Counter[str]()
    stride = max(1, sum(path.stat().st_size for path in unit_files(folder)) // FLIPS)
    for number, path in enumerate(unit_files(folder)):
        original = path.read_bytes()
        rng = random.Random(number)
        for place in places(len(original), stride, number):
            damaged = bytearray(original)
            damaged[place] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            result = verdict(folder, expected)
            seen[result.split()[0]] += 1
            if result not in ("found", "harmless"):
                around = bytes(damaged[max(place - 20, 0) : place + 20])
                unseen.append((path.relative_to(folder).as_posix(), place, around, result))
        path.write_bytes(original)
    sys.stdout.write(f"{open_store(folder).format}: {dict(seen)}\n")
    assert unseen == []
    assert verdict(folder, expected) == "harmless"
    # more than half of a small HDF5 file is padding
    assert seen["found"] > FLIPS // 4


def test_a_flipped_bit_of_any_array_is_found_by_its_reader(folder: Path):
    """Without `verify_store`: every byte of a raw matrix, in the middle of the files that hold arrays."""
    arrays = [path for path in unit_files(folder) if path.suffix != ".json"]
    assert len(arrays) >= 2
    missed, flips = [], 0
    for number, path in enumerate(arrays):
        original = path.read_bytes()
        for place in array_bytes(folder, path, original, number):
            damaged = bytearray(original)
            damaged[place] ^= 1
            path.write_bytes(damaged)
            flips += 1
            if not reads_alone(open_store(folder)):
                missed.append((path.name, place))
        path.write_bytes(original)
    assert missed == []
    assert flips > 20


def array_bytes(folder: Path, path: Path, original: bytes, seed: int) -> list[int]:
    """Where a file holds the bytes of an array: a raw or compressed chunk, or a part of HDF5 where they are found."""
    if open_store(folder).format == "zarr":
        return list(places(len(original), 11, seed))
    slide = open_store(folder)[SLIDES[0]]
    held = [a.tobytes() for a in (slide.coords(), slide.tissue_fraction, slide._all_features(ENTRY)) if a.size]
    starts = [(original.find(array), len(array)) for array in held]
    return [start + place for start, size in starts if start >= 0 for place in places(size, 11, seed)]


@pytest.mark.parametrize("kept", [0, 1, 0.5, -1])
def test_a_file_that_was_cut_off_is_found(folder: Path, kept: float):
    expected, unseen = content(folder), []
    for path in unit_files(folder):
        original = path.read_bytes()
        path.write_bytes(original[: int(len(original) * kept) if kept == 0.5 else int(kept)])
        result = verdict(folder, expected)
        # the two groups hold nothing; they are there for Zarr libraries
        allowed = {"found", "harmless"} if path.parent.parent == folder and path.name == "zarr.json" else {"found"}
        if result not in allowed:
            unseen.append((path.relative_to(folder).as_posix(), result))
        path.write_bytes(original)
    assert unseen == []


def test_a_file_that_is_gone_is_found_or_its_unit_is(folder: Path):
    """Without its record a unit is not there, which is no damage; whatever else goes is found."""
    expected, unseen = content(folder), []
    store = open_store(folder)
    units = {store.tiles_path(SLIDES[0]), store.feature_path(SLIDES[0], ENTRY)}
    records = units | {unit / "zarr.json" for unit in units}
    groups = {folder / "tiles/zarr.json", folder / "features/zarr.json"}
    for path in unit_files(folder):
        original = path.read_bytes()
        path.unlink()
        allowed = {"found"} | ({"unseen"} if path in records else {"harmless"} if path in groups else set())
        if (result := verdict(folder, expected)) not in allowed:
            unseen.append((path.relative_to(folder).as_posix(), result))
        path.write_bytes(original)
    assert unseen == []
