"""Conversion: from any backend to any other and back, not a byte of a unit is another."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from extract.errors import EntryNotFoundError, RecipeMismatchError, StoreError
from extract.store import Store, TilesUnit, convert_store, create_store, open_store
from tests.test_extract.small import EXECUTION, TILES, feature_recipe, matrix, tiles_unit, tree
from tests.test_extract.store_conformance import flip_byte

IDS = ["a", "none", "site A/b", "x" * 400]
FLAGS = {"blurred": [0, 2], "empty": []}


def fill(path: Path, format: str) -> Store:
    """A store with two entries, slides of all kinds, and a log."""
    store = create_store(path, TILES, format)
    store.create_entry("tiny", feature_recipe())
    store.create_entry("wide", feature_recipe(dim=9, dtype="float32"))
    for seed, slide_id in enumerate(IDS):
        n = 0 if slide_id == "none" else 5 + seed
        mask = np.random.default_rng(seed).random((9, 12)) < 0.5
        store.write_tiles(replace(tiles_unit(slide_id, n, seed), tissue_mask=mask))
        invalid = [1] if n else []
        features = matrix(n, seed=seed)
        features[invalid] = 0
        store.write_features("tiny", slide_id, features, invalid, EXECUTION, FLAGS)
    store.write_features("wide", "a", matrix(5, 9, dtype="float32"), [], EXECUTION)
    store.write_tiles(TilesUnit("imported", None, None, None, {"n_tiles": 3}))
    store.write_features("tiny", "imported", matrix(3), [], EXECUTION)
    store.start_run().append({"slide_id": "a"})
    return store


def content(store: Store) -> dict[tuple[str, ...], object]:
    """All that a store says of its slides, arrays as bytes."""
    found: dict[tuple[str, ...], object] = {}
    for slide_id in store:
        slide = store[slide_id]
        found[slide_id, "record"] = dict(slide.record)
        for name in slide.record["sha256"]:
            array = slide.array(name)
            found[slide_id, name] = (array.dtype, array.shape, array.tobytes())
        for entry in slide.entries():
            matrix_ = slide.matrix(entry)
            found[slide_id, entry] = (matrix_.dtype, matrix_.shape, matrix_.tobytes())
            found[slide_id, entry, "record"] = dict(slide.feature_record(entry))
            slide.verify_features(entry)
        slide.verify_tiles()
    return found


@pytest.mark.parametrize(("there", "other"), [("zarr", "h5"), ("h5", "zarr"), ("zarr", "zarr"), ("h5", "h5")])
def test_there_and_back_nothing_is_lost(tmp_path: Path, there: str, other: str):
    store = fill(tmp_path / "one", there)
    report = convert_store(store.path, tmp_path / "two", other)
    assert (report.copied, report.skipped, report.failed) == (11, 0, {})
    two = open_store(tmp_path / "two")
    assert two.format == other
    assert content(two) == content(store)
    assert two.tile_recipe == store.tile_recipe
    assert [two.feature_recipe(e) for e in two.entries()] == [store.feature_recipe(e) for e in store.entries()]
    convert_store(two.path, tmp_path / "three", there)
    # the files too, with the logs
    assert tree(tmp_path / "three", but=("index.json",)) == tree(store.path, but=("index.json",))


def test_a_conversion_goes_on_where_it_stopped(tmp_path: Path):
    store, calls = fill(tmp_path / "one", "zarr"), []

    def stop(done: int, total: int, slide_id: str) -> None:
        calls.append((done, total, slide_id))
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_store(store.path, tmp_path / "two", "h5", progress=stop)
    assert calls == [(i, 11, calls[i - 1][2]) for i in range(1, 8)]
    report = convert_store(store.path, tmp_path / "two", "h5")
    assert (report.copied, report.skipped) == (4, 7)
    assert content(open_store(tmp_path / "two")) == content(store)


def test_chosen_entries_only(tmp_path: Path):
    store = fill(tmp_path / "one", "zarr")
    convert_store(store.path, tmp_path / "two", "h5", ["wide"])
    assert open_store(tmp_path / "two").entries() == ["wide"]
    with pytest.raises(EntryNotFoundError, match="uni"):
        convert_store(store.path, tmp_path / "three", "h5", ["uni"])
    assert not (tmp_path / "three").exists()


@pytest.mark.parametrize("format", ["zarr", "h5"])
def test_a_damaged_unit_is_reported_and_not_taken_over(tmp_path: Path, format: str):
    store = fill(tmp_path / "one", format)
    unit = store.feature_path("site A/b", "tiny")
    flip_byte(unit / "c/0/0" if format == "zarr" else unit, store["site A/b"].matrix("tiny").tobytes())
    report = convert_store(store.path, tmp_path / "two", "h5")
    assert list(report.failed) == ["site A/b [tiny]"]
    assert "site A/b" in report.failed["site A/b [tiny]"]
    two = open_store(tmp_path / "two")
    assert two.slide_ids("tiny") == sorted([*(set(IDS) - {"site A/b"}), "imported"])
    assert two.slide_ids() == store.slide_ids()


def test_what_is_there_is_never_replaced(tmp_path: Path):
    store = fill(tmp_path / "one", "zarr")
    two = create_store(tmp_path / "two", TILES, "h5")
    two.write_tiles(tiles_unit("a", 4, seed=9))
    before = two["a"].coords().tolist()
    report = convert_store(store.path, two.path, "h5")
    assert "another unit of slide 'a'" in report.failed["a"]
    assert two["a"].coords().tolist() == before
    with pytest.raises(StoreError, match="in place"):
        convert_store(store.path, store.path, "zarr")
    with pytest.raises(StoreError, match="'h5'"):
        convert_store(store.path, two.path, "zarr")
    create_store(tmp_path / "other", replace(TILES, mpp=2.0), "h5").write_tiles(tiles_unit("z"))
    with pytest.raises(RecipeMismatchError, match="mpp"):
        convert_store(store.path, tmp_path / "other", "h5")
