"""Slides whose tiles cannot be decoded: an incomplete copy is no success, and a mended one is taken up again."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from extract.errors import RecipeError, SlideClaimedError, SlideNotFoundError, SlideTableError
from extract.pipeline.extraction import run_extraction
from extract.pipeline.report import ExtractionReport
from extract.store import open_store
from extract.store.upkeep.repair import plan_removal, set_aside
from extract.store.upkeep.verify import verify_store
from tests.test_extract.small import EXECUTION, TILES, break_tile, tiny_backbone, tree, write_slide


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    """A slide of 20 tiles in a folder of its own."""
    return write_slide(tmp_path / "slides" / "a.tif", 400, 336)


@pytest.fixture(params=["zarr", "h5"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Where the store is to be."""
    return tmp_path / f"s.{request.param}"


def extract(slide: Path, store: Path, **keywords: Any) -> ExtractionReport:
    return run_extraction(
        slide.parent,
        store,
        tiny_backbone(),
        recipe=TILES,
        format=store.suffix[1:],
        runtime="torch",
        **{"isolation": False} | keywords,
    )


def break_tiles(slide: Path, n: int) -> bytes:
    """Break the first ``n`` TIFF tiles of the tissue; the bytes before."""
    whole = slide.read_bytes()
    for i in range(n):
        break_tile(slide, 64 * (1 + i % 4), 64 * (1 + i // 4))
    return whole


@pytest.mark.parametrize("isolation", [False, True])
def test_above_the_limit_a_slide_fails_and_its_good_tiles_are_stored(slide: Path, store: Path, isolation: bool):
    break_tiles(slide, 3)
    report = extract(slide, store, isolation=isolation)
    (outcome,) = report.outcomes
    assert (outcome.outcome, outcome.n_invalid) == ("failed", 3)
    for part in ("3 of ", "JPEG", "--max-invalid", "copy the file again"):
        assert part in outcome.reason
    assert len(open_store(store)["a"].features("tiny")) == outcome.n_tiles - 3
    # so it does the next time, and does not where more is permitted
    assert extract(slide, store, isolation=isolation).outcomes[0].outcome == "failed"
    assert extract(slide, store, max_invalid=0.5).outcomes[0].outcome == "complete"


def test_the_limit_itself_is_permitted(slide: Path, store: Path):
    break_tiles(slide, 1)
    n = extract(slide, store, max_invalid=1.0).outcomes[0].n_tiles
    assert extract(slide, store, max_invalid=1 / n).count("complete") == 1
    assert len(extract(slide, store, max_invalid=0.99 / n).failed) == 1
    with pytest.raises(RecipeError, match="max_invalid"):
        extract(slide, store, max_invalid=5)


def test_tiles_that_can_be_decoded_again_are_embedded_by_the_next_run(
    slide: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from extract.errors import TileDecodeError
    from extract.slides.slide import Slide

    read = Slide.read_tile

    def failing(self: Slide, x: int, y: int, *arguments: Any, **keywords: Any) -> np.ndarray:
        if y == 64:
            raise TileDecodeError("the network was away")
        return read(self, x, y, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(Slide, "read_tile", failing)
        first = extract(slide, store).outcomes[0]
        assert first.outcome == "failed"
        assert "network was away" in first.reason
        assert extract(slide, store).outcomes[0].n_invalid == first.n_invalid > 0
    # the file is the same, and the disk is back
    again = extract(slide, store)
    assert (again.outcomes[0].outcome, again.outcomes[0].n_invalid) == ("embedded", 0)
    clean = store.with_name(f"clean{store.suffix}")
    extract(slide, clean)
    np.testing.assert_array_equal(open_store(store)["a"].features("tiny"), open_store(clean)["a"].features("tiny"))
    assert verify_store(open_store(store)) == []
    assert extract(slide, store).count("complete") == 1


def test_a_better_copy_of_a_slide_that_failed_is_taken(slide: Path, store: Path):
    whole = break_tiles(slide, 3)
    assert extract(slide, store).failed
    slide.write_bytes(whole)
    report = extract(slide, store)
    assert (report.outcomes[0].outcome, report.outcomes[0].n_invalid) == ("embedded", 0)
    assert verify_store(open_store(store)) == []


def test_another_file_of_a_good_slide_is_refused_and_redone_when_asked(slide: Path, store: Path):
    extract(slide, store)
    before = open_store(store)["a"].features("tiny")[:].copy()
    write_slide(slide, 400, 336, seed=5)
    assert "--redo 'a'" in extract(slide, store).failed[0].reason
    with pytest.raises(SlideTableError, match="--redo b"):
        extract(slide, store, redo=["b"])
    assert extract(slide, store, redo=["a"]).count("embedded") == 1
    now = open_store(store)["a"].features("tiny")
    assert now.shape != before.shape or not np.array_equal(now, before)
    # what was there is set aside, whole
    aside = [path for path in (store / "quarantine").rglob("*") if path.is_file()]
    assert aside
    assert verify_store(open_store(store)) == []
    assert extract(slide, store).count("complete") == 1


def test_removing_a_slide_touches_no_other(slide: Path, store: Path):
    write_slide(slide.with_name("b.tif"), seed=3)
    extract(slide, store)
    others = {path: content for path, content in tree(store).items() if "/a" not in str(path)}
    set_aside(open_store(store, "r+"), ["a"])
    left = open_store(store)
    assert left.slide_ids() == left.slide_ids("tiny") == ["b"]
    now = tree(store)
    assert all(now[path] == content for path, content in others.items() if "index" not in str(path))
    with pytest.raises(SlideNotFoundError, match="'a'"):
        plan_removal(left, ["a"])


def test_what_another_process_is_at_work_on_is_not_removed(slide: Path, store: Path):
    extract(slide, store)
    opened = open_store(store, "r+")
    shutil.rmtree(opened.feature_path("a", "tiny")) if opened.feature_path("a", "tiny").is_dir() else os.remove(
        opened.feature_path("a", "tiny")
    )
    draft = opened.draft("tiny", "a", EXECUTION)
    with pytest.raises(SlideClaimedError):
        plan_removal(opened, ["a"])
    draft.discard()
    assert set_aside(opened, ["a"])
