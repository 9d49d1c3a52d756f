"""Claims: a slide is this run's in every entry or in none, and is given back whatever happens."""

import time
from pathlib import Path

import pytest

from extract.errors import SlideClaimedError
from extract.pipeline.claims import Claims
from extract.pipeline.jobs import Column
from extract.store import Store, create_store
from tests.test_extract.small import EXECUTION, TILES, tiles_unit, tiny_backbone

ENTRIES = ("one", "two")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with two entries and the tiles of one slide."""
    store = create_store(tmp_path / "s.zarr", TILES)
    for entry in ENTRIES:
        store.create_entry(entry, tiny_backbone().recipe)
    store.write_tiles(tiles_unit("a"))
    return store


@pytest.fixture
def columns() -> list[Column]:
    """What fills the entries."""
    return [Column(entry, tiny_backbone()) for entry in ENTRIES]


def make(store: Store) -> Claims:
    return Claims(store, dict.fromkeys(ENTRIES, EXECUTION))


def claimed(store: Store) -> list[bool]:
    return [store.is_claimed("a", entry) for entry in ENTRIES]


def test_a_slide_is_claimed_in_every_entry_or_in_none(store: Store, columns: list[Column]):
    ours, theirs = make(store), make(store)
    assert list(theirs.open("a", columns[1:])) == ["two"]
    with pytest.raises(SlideClaimedError):
        ours.open("a", columns)
    assert (len(ours), claimed(store)) == (0, [False, True])


def test_what_was_taken_is_not_given_back_twice(store: Store, columns: list[Column]):
    claims = make(store)
    drafts = claims.open("a", columns)
    assert (len(claims), claimed(store)) == (2, [True, True])
    taken = claims.take("a", "one")
    assert taken is drafts["one"]
    claims.release("a", ENTRIES)
    assert (len(claims), claimed(store)) == (0, [True, False])
    taken.discard()


def test_all_is_given_back_in_the_end(store: Store, columns: list[Column]):
    claims = make(store)
    claims.open("a", columns)
    claims.release_all()
    assert claimed(store) == [False, False]


def test_leases_are_renewed_as_long_as_they_are_kept(
    store: Store, columns: list[Column], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("extract.pipeline.claims.LEASE_S", 0.06)
    claims = make(store)
    claims.open("a", columns)
    beats: list[str] = []
    for draft in claims._drafts.values():
        monkeypatch.setattr(draft, "touch", lambda: beats.append("touch"))
    with claims.kept():
        until = time.monotonic() + 5
        while len(beats) < 4 and time.monotonic() < until:
            time.sleep(0.005)
    assert len(beats) >= 4
    count = len(beats)
    time.sleep(0.05)
    assert len(beats) == count
    claims.release_all()
