"""index.json: the same listing with it, without it, and with one that lies."""

import json
import os
from pathlib import Path

import pytest

from extract.errors import StoreError
from extract.store import Store, create_store, open_store
from tests.test_extract.small import EXECUTION, TILES, feature_recipe, matrix, tiles_unit

IDS = ["a", "site B/slide 2", "c" * 300]


@pytest.fixture(params=["zarr", "h5"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    store = create_store(tmp_path / "s", TILES, format=request.param)
    store.create_entry("net", feature_recipe())
    for n, slide_id in enumerate(IDS, start=3):
        add(store, slide_id, n)
    store.write_index()
    return store


def add(store: Store, slide_id: str, n: int) -> None:
    store.write_tiles(tiles_unit(slide_id, n))
    features = matrix(n)
    features[0] = 0
    store.write_features("net", slide_id, features, [0], EXECUTION)


def listing(store: Store) -> dict[str, int]:
    return {slide_id: store.n_tiles(slide_id, "net") for slide_id in store.slide_ids("net")}


def test_a_fresh_reader_lists_by_the_index_alone(store: Store, monkeypatch: pytest.MonkeyPatch):
    fresh = open_store(store.path)
    monkeypatch.setattr(type(store), "_read_record", lambda *_: pytest.fail("a record was read"))
    short = [slide_id for slide_id in IDS if len(slide_id) < 100]
    assert {slide_id: fresh.n_tiles(slide_id, "net") for slide_id in short} == {"a": 2, "site B/slide 2": 3}


def test_with_and_without_index_is_the_same_listing(store: Store):
    expected = listing(open_store(store.path))
    assert expected == {"a": 2, "site B/slide 2": 3, "c" * 300: 4}
    (store.path / "index.json").unlink()
    assert listing(open_store(store.path)) == expected


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"tessera": {"units": {"tiles/a": [1]}}}', "\x00\xff" * 9])
def test_a_damaged_index_changes_nothing(store: Store, content: str):
    expected = listing(open_store(store.path))
    (store.path / "index.json").write_text(content)
    assert listing(open_store(store.path)) == expected


def test_units_that_come_and_go_are_seen(store: Store):
    reader = open_store(store.path)
    assert len(listing(reader)) == 3
    add(store, "later", 9)
    os.rename(store.feature_path("a", "net"), store.path / "aside")
    for each in (reader, open_store(store.path)):
        assert listing(each) == {"site B/slide 2": 3, "c" * 300: 4, "later": 8}


def test_features_of_tiles_that_were_cut_again_are_not_listed(store: Store):
    os.rename(store.tiles_path("a"), store.path / "aside")
    store.write_tiles(tiles_unit("a", 5))
    assert "a" not in listing(open_store(store.path))


def test_an_index_is_not_written_by_readers(store: Store):
    with pytest.raises(StoreError, match="reading"):
        open_store(store.path).write_index()


def test_an_index_that_lies_is_made_anew(store: Store):
    file = store.path / "index.json"
    file.write_text(file.read_text().replace(', 3, 1, "', ', 99, 1, "'))
    assert listing(open_store(store.path))["a"] == 98
    open_store(store.path, "r+").write_index(anew=True)
    assert listing(open_store(store.path))["a"] == 2


def test_lines_of_units_that_are_gone_leave_the_index(store: Store):
    os.rename(store.feature_path("a", "net"), store.path / "aside")
    store.write_index()
    units = json.loads((store.path / "index.json").read_text())["tessera"]["units"]
    assert len(units) == 5
    assert not any(key.startswith("features/net/a") for key in units)
