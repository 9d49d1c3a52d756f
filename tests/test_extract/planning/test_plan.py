"""Planning says what the extraction then does, and touches nothing."""

import inspect
import shutil
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from extract.backbones.backbone import Backbone
from extract.errors import (
    BackboneError,
    RecipeError,
    RecipeMismatchError,
    RuntimeConversionError,
    SlideUnreadableError,
    StoreError,
)
from extract.pipeline.config import EntryConfig
from extract.pipeline.extraction import run_extraction
from extract.pipeline.jobs import make_columns
from extract.planning.plan import plan_extraction
from extract.planning.planned import ExtractionPlan, PlannedSlide, SilentPlan
from extract.reading.isolation import ReaderProcess
from extract.reading.reader import Reader
from extract.store import open_store
from tests.test_extract.small import TILES, tiny_backbone, tree, write_slide

Planner = Callable[..., ExtractionPlan]


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    """Two good slides of different scale, and four that cannot be used, each for another reason."""
    folder = tmp_path / "slides"
    write_slide(folder / "a" / "same.tif", 400, 300)
    write_slide(folder / "finer.tif", 900, 700, mpp=0.3, seed=1)
    write_slide(folder / "no scale.tif", mpp=None)
    write_slide(folder / "coarse.tif", mpp=2.0)
    write_slide(folder / "tiny.tif", 40, 30, levels=1)
    (folder / "text.svs").write_text("not a slide")
    return folder


def plan(slides: Path, **arguments: object) -> ExtractionPlan:
    """A plan without measuring, in this process unless told otherwise."""
    values = {"backbone": tiny_backbone(), "recipe": TILES, "measure": False, "isolation": False}
    return plan_extraction(slides, **(values | arguments))  # type: ignore[arg-type]


def test_the_plan_is_what_the_extraction_does(slides: Path, tmp_path: Path):
    settings = {"backbone": tiny_backbone(), "recipe": TILES, "views": 1}
    planned = plan(slides, isolation=True, **settings)
    report = run_extraction(slides, tmp_path / "s.zarr", **settings)  # type: ignore[arg-type]
    assert {s.slide_id: s.reason for s in planned.failed} == {o.slide_id: o.reason for o in report.failed}
    assert {s.slide_id: s.n_tiles for s in planned.to_embed} == {
        o.slide_id: o.n_tiles for o in report.outcomes if o.outcome == "embedded"
    }
    store = open_store(tmp_path / "s.zarr")
    for slide in planned.to_embed:
        record = store[slide.slide_id].record
        assert (slide.native_mpp, slide.mpp_source) == (record["mpp"]["native"], record["mpp"]["source"])
        assert (slide.level, slide.achieved_mpp) == (record["level"], record["mpp"]["achieved"])
        assert slide.resampled == (record["tile_level"] != record["tile_px"])
        assert slide.tissue_mm2 == record["tissue"]["area_mm2"]
    assert {slide.resampled for slide in planned.to_embed} == {True, False}
    chunks = list((tmp_path / "s.zarr" / "features").rglob("c/0/0"))
    assert planned.cache_bytes == sum(file.stat().st_size for file in chunks) > 0
    assert [entry.name for entry in planned.entries] == store.entries()


def test_nothing_is_written(slides: Path, tmp_path: Path):
    plan(slides, store=tmp_path / "s.zarr")
    assert not (tmp_path / "s.zarr").exists()
    run_extraction(slides, tmp_path / "s.zarr", tiny_backbone(), recipe=TILES)
    before = tree(tmp_path, but=())
    plan(slides, store=tmp_path / "s.zarr", backbone=tiny_backbone(8), entry="other", measure=True, measure_s=0.1)
    assert tree(tmp_path, but=()) == before


def test_slides_that_are_complete_are_counted_apart(slides: Path, tmp_path: Path):
    run_extraction(slides / "a", tmp_path / "s.zarr", tiny_backbone(), recipe=TILES, table=None)
    planned = plan(slides / "a", store=tmp_path / "s.zarr")
    assert [slide.slide_id for slide in planned.complete] == ["same"]
    assert (planned.to_embed, planned.n_tiles, planned.cache_bytes, planned.seconds) == ((), 0, 0, 0.0)
    # one more view of each tile: only that is missing
    more = plan(slides / "a", store=tmp_path / "s.zarr", views=1)
    assert more.cache_bytes == planned.complete[0].n_tiles * 6 * 2
    assert more.cut_seconds == 0


def test_entries_are_named_as_the_extraction_names_them():
    from extract.planning.measure import PlanModel

    backbone = tiny_backbone()
    config = EntryConfig(views=2, context_mpp=(1.0, 2.0))
    columns = make_columns(backbone, config)
    entries = PlanModel.of(backbone).entries(config)
    assert [entry.name for entry in entries] == [column.entry for column in columns]
    assert [entry.context_mpp for entry in entries] == [column.backbone.recipe.context_mpp for column in columns]


def test_a_context_that_is_not_coarser_is_refused_or_where_each_slide_tells_fails_it(slides: Path):
    with pytest.raises(RecipeError, match=r"coarser than the tiles' 0\.5"):
        plan(slides / "a", context_mpp=(0.25,))
    planned = plan(slides / "a", context_mpp=(0.25,), recipe=replace(TILES, mpp=None))
    assert [slide.outcome for slide in planned.slides] == ["fail"]
    assert planned.failed[0].reason.startswith("slide 'same': ")


@pytest.mark.parametrize("change", ["file", "mpp", "mask"])
def test_a_slide_that_is_not_what_was_cut_before_fails(tmp_path: Path, change: str):
    slide = write_slide(tmp_path / "slides" / "x.tif", mpp=None)
    settings = {"default_mpp": 0.5, "recipe": TILES, "backbone": tiny_backbone()}
    run_extraction(slide, tmp_path / "s.zarr", **settings)  # type: ignore[arg-type]
    if change == "file":
        write_slide(slide, 300, 300, mpp=None, seed=5)
    if change == "mpp":
        settings["default_mpp"] = 0.4
    if change == "mask":
        (tmp_path / "slides" / "x.png").write_bytes(b"another mask")
        settings["masks"] = "x.png"
    planned = plan(slide, store=tmp_path / "s.zarr", **settings)
    assert [s.outcome for s in planned.slides] == ["fail"]
    assert {"file": "a file", "mpp": "µm/px", "mask": "mask"}[change] in planned.failed[0].reason.partition("→")[0]
    report = run_extraction(slide, tmp_path / "s.zarr", **settings)  # type: ignore[arg-type]
    assert [outcome.reason for outcome in report.outcomes] == [planned.failed[0].reason]


def test_another_recipe_than_the_stores_is_refused(slides: Path, tmp_path: Path):
    run_extraction(slides / "a", tmp_path / "s.zarr", tiny_backbone(), recipe=TILES)
    with pytest.raises(RecipeMismatchError, match=r"mpp: 0\.5 → 1"):
        plan(slides / "a", store=tmp_path / "s.zarr", recipe=None, mpp=1.0, tile_px=64)
    with pytest.raises(RecipeMismatchError, match="dim: 6 → 8"):
        plan(slides / "a", store=tmp_path / "s.zarr", backbone=tiny_backbone(8))
    with pytest.raises(StoreError, match="not a store"):
        plan(slides / "a", store=slides)


def test_a_default_mpp_that_is_none_is_refused(slides: Path):
    with pytest.raises(RecipeError):
        plan(slides, default_mpp=0.0)


def test_presets_need_not_be_loaded_for_their_size(slides: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*arguments: object, **keywords: object) -> None:
        raise BackboneError("got no weights → expected some → mil models pull")

    monkeypatch.setattr("extract.backbones.backbone.load_backbone", refuse)
    planned = plan(slides / "a", backbone="uni")
    assert (planned.entries[0].dim, planned.problems) == (1024, ())
    # to measure they are needed: the plan is made, and says what stands in the way
    planned = plan(slides / "a", backbone="uni", measure=True)
    assert planned.cache_bytes == planned.n_tiles * 1024 * 2 > 0
    assert planned.rate is None
    assert "mil models pull" in planned.problems[0]
    with pytest.raises(BackboneError):
        plan(slides / "a", backbone="no such model")


def test_the_rate_is_measured_through_the_stream(slides: Path):
    planned = plan(slides, measure=True, measure_s=0.5, views=1, isolation=True, runtime="torch")
    rate = planned.rate
    assert rate is not None
    assert rate.tiles_per_s == pytest.approx(rate.n_tiles / rate.seconds)
    assert 0 < rate.seconds <= 0.5
    assert rate.device.startswith("cpu (fp32, torch, batch size 4")
    assert planned.start_seconds > 0
    parts = planned.start_seconds, planned.cut_seconds, planned.n_tiles / rate.tiles_per_s
    assert planned.seconds == pytest.approx(sum(parts))
    # the first two slides hold fewer tiles than half a second is long: they come again, and are counted once
    assert rate.n_different == min(rate.n_tiles, planned.n_tiles)


def test_loading_the_backbone_is_part_of_the_start(slides: Path, monkeypatch: pytest.MonkeyPatch):
    def load(name: str, **keywords: object) -> Backbone:
        time.sleep(0.3)
        return tiny_backbone()

    monkeypatch.setattr("extract.backbones.backbone.load_backbone", load)
    assert plan(slides / "a", backbone="tiny").start_seconds >= 0.3


def test_a_runtime_that_cannot_be_had_is_a_problem(slides: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(self: Backbone, runtime: str, batch_size: int, threads: int) -> None:
        raise RuntimeConversionError("got an operator → expected another → --runtime torch")

    monkeypatch.setattr(Backbone, "use_runtime", refuse)
    assert "--runtime torch" in plan(slides / "a", measure=True, measure_s=0.1, runtime="openvino").problems[0]
    # an extraction goes on with torch, and so does its plan
    assert plan(slides / "a", measure=True, measure_s=0.1, runtime="auto").rate is not None


def test_an_embedding_that_the_store_cannot_hold_is_a_problem(slides: Path):
    planned = plan(slides / "a", backbone=tiny_backbone(scale=1e9), measure=True, measure_s=0.1)
    assert planned.rate is None
    assert "float16 ends at 65504" in planned.problems[0]


def test_a_disk_that_is_too_small_is_a_problem(slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    assert plan(slides).free_bytes is None
    planned = plan(slides, store=tmp_path / "s.zarr")
    assert planned.free_bytes == 100 < planned.cache_bytes
    assert "free some space" in planned.problems[0]


def test_a_slide_that_kills_its_reader_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ReaderProcess, "module", "tests.test_extract.hostile_reader")
    for name in ("good", "cut-segv", "fine"):
        write_slide(tmp_path / "slides" / f"{name}.tif")
    planned = plan(tmp_path / "slides", isolation=True)
    assert [slide.slide_id for slide in planned.failed] == ["cut-segv"]
    assert "SIG" in planned.failed[0].reason


def test_the_reader_is_told_and_why_it_is_not_the_fastest(slides: Path):
    assert [(s.reader, s.reader_note) for s in plan(slides).to_embed] == [("direct", "")] * 2
    slide = plan(slides / "a", reader="openslide").slides[0]
    assert (slide.reader, slide.reader_note) == ("openslide", "OpenSlide was asked for")


def test_a_slide_of_which_no_tile_can_be_read_fails(slides: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*arguments: object) -> None:
        raise SlideUnreadableError("got a slide that cannot be read on → copy it again")

    monkeypatch.setattr(Reader, "_read_run", refuse)
    planned = plan(slides / "a")
    assert [slide.reason for slide in planned.failed] == ["got a slide that cannot be read on → copy it again"]


def test_progress_hears_of_every_slide(slides: Path):
    heard: list[object] = []

    class Progress(SilentPlan):
        def start(self, n_slides: int) -> None:
            heard.append(n_slides)

        def slide_done(self, slide: PlannedSlide) -> None:
            heard.append(slide)

    planned = plan(slides, progress=Progress())
    assert heard == [6, *planned.slides]
    assert [slide.slide_id for slide in planned.slides] == sorted(slide.slide_id for slide in planned.slides)


def test_defaults_are_those_of_the_extraction():
    ours, theirs = (inspect.signature(function).parameters for function in (plan_extraction, run_extraction))
    assert set(ours) - set(theirs) == {"measure", "measure_s"}
    assert set(theirs) <= set(ours)
    assert all(ours[name].default == theirs[name].default for name in theirs if name != "store")
