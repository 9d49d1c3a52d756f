"""The summary of a store: what is complete, what not, at which scale, and how large."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from extract.store import Store, create_store
from extract.store.core.files import disk_bytes
from extract.store.upkeep.summary import summarise
from tests.test_extract.healthy import FORMATS, RECIPE, healthy_store, unit_files, whole_unit
from tests.test_extract.small import EXECUTION, feature_recipe, matrix


def remove(unit: Path) -> None:
    shutil.rmtree(unit) if unit.is_dir() else unit.unlink()


@pytest.fixture(params=FORMATS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A healthy store of three slides and two entries."""
    return healthy_store(tmp_path / "store", request.param)


def test_a_healthy_store_is_counted(store: Store):
    summary = summarise(store)
    assert (summary.format, summary.tile_px, summary.mpp, summary.n_tiles) == (store.format, 64, 0.5, 18)
    assert [(e.name, e.backbone, e.dim, e.dtype, e.complete, e.rows) for e in summary.entries] == [
        ("tiny", "tiny", 6, "float16", 3, 18),
        ("wide", "tiny", 6, "float32", 3, 18),
    ]
    assert [slide.slide_id for slide in summary.slides] == ["a", "b", "site 1/c"]
    assert summary.mpp_range("native_mpp") == summary.mpp_range("achieved_mpp") == (0.5, 0.5)
    files = [path for path in store.path.rglob("*") if path.is_file()]
    assert summary.n_bytes == sum(path.stat().st_size for path in files)
    units = [unit for entry in (None, "tiny", "wide") for unit in store.unit_paths(entry).values()]
    assert sum(slide.n_bytes for slide in summary.slides) == sum(disk_bytes(unit) for unit in units)


def test_every_state_of_a_slide_is_told(store: Store):
    for slide_id in ("d", "e", "f"):
        store.write_tiles(whole_unit(slide_id))
    store.draft("tiny", "d", EXECUTION).save(matrix(3), [], np.zeros(3, np.uint8))
    for path in unit_files(store.feature_path("a", "tiny")):
        path.write_bytes(b"?")
    remove(store.tiles_path("b"))
    for path in unit_files(store.tiles_path("f")):
        path.write_bytes(b"?")
    summary = summarise(store)
    states = {slide.slide_id: slide.entries["tiny"] for slide in summary.slides}
    assert states == {
        "a": "damaged",
        "b": "waiting",
        "site 1/c": "complete",
        "d": "partial",
        "e": "without",
        "f": "without",
    }
    (tiny, _) = summary.entries
    assert (tiny.complete, tiny.partial, tiny.without, tiny.damaged, tiny.waiting, tiny.rows) == (1, 1, 2, 1, 1, 6)
    problems = {slide.slide_id: slide.problem for slide in summary.slides if slide.problem}
    assert set(problems) == {"b", "f"}
    assert (summary.n_leftovers, summary.n_tiles) == (2, 24)
    assert summary.leftover_bytes > 36


def test_the_range_of_scales_is_told_and_may_be_unknown(tmp_path: Path):
    store = create_store(tmp_path / "store", replace(RECIPE, mpp=None))
    assert summarise(store).mpp_range("native_mpp") is None
    for name, mpp in (("a", 0.25), ("b", 0.5), ("c", None)):
        unit = whole_unit(name)
        facts = {"native": mpp, "requested": None, "achieved": mpp, "source": "openslide.mpp"}
        store.write_tiles(replace(unit, record={**unit.record, "mpp": facts}))
    assert summarise(store).mpp_range("native_mpp") == (0.25, 0.5)


def test_an_entry_whose_recipe_is_damaged_is_listed(store: Store):
    (store.path / "features" / "tiny" / store.entry_name).write_text("?")
    (tiny, wide) = summarise(store).entries
    assert (tiny.backbone, tiny.dim, tiny.complete) == (None, None, 0)
    assert wide.complete == 3


def test_no_embedding_is_read_and_one_record_per_unit(store: Store, monkeypatch: pytest.MonkeyPatch):
    read: list[Path] = []
    read_record = type(store)._read_record

    def count(self: Store, unit: Path) -> dict[str, object]:
        read.append(unit)
        return read_record(self, unit)

    monkeypatch.setattr(type(store), "_read_record", count)
    monkeypatch.setattr(type(store), "_read_array", lambda *_: pytest.fail("an array was read"))
    summarise(store)
    assert len(read) == len(set(read)) == 9


def test_a_store_without_entries_or_slides_is_summarised(tmp_path: Path):
    store = create_store(tmp_path / "store", RECIPE)
    assert summarise(store).slides == summarise(store).entries == ()
    store.create_entry("tiny", feature_recipe())
    assert [entry.complete for entry in summarise(store).entries] == [0]
