"""Extraction end to end: an account of every slide, resume without loss, and refusals that name the reason."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from extract.backbones.backbone import Backbone
from extract.errors import ExtractError, RecipeError, RecipeMismatchError, SlideTableError, StoreError, StoreFullError
from extract.geometry import plan_read
from extract.pipeline.claims import Claims
from extract.pipeline.extraction import run_extraction
from extract.pipeline.jobs import StreamStats, entry_name
from extract.pipeline.preparation import Preparation
from extract.pipeline.report import Silent, SlideOutcome
from extract.pipeline.run import ExtractionRun
from extract.reading.isolation import ReaderLimits, ReaderProcess
from extract.slides.finding.source import SlideSource
from extract.slides.slide import Slide
from extract.slides.tiff.tile_cache import TileCache
from extract.store import Store, TileRecipe, TissueRecipe, ZarrStore, open_store
from extract.synthetic.pyramid import write_pyramid
from extract.tiling.tiles import context_tiles
from tests.conftest import REPOSITORY
from tests.test_extract.small import TILES, break_tile, tiny_backbone, tissue_image, tree, write_slide


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    """A folder of three slides, one in a subfolder with an unusual name."""
    folder = tmp_path / "slides"
    for number, name in enumerate(("a.tif", "b.tif", "sité 2/c d.tif")):
        write_slide(folder / name, 400 + 20 * number, 300, seed=number)
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Where the store is to be."""
    return tmp_path / "s.zarr"


def extract(slides: Path | list[Path], store: Path, backbone: Backbone | None = None, **keywords: object):
    """Run with the tiny backbone and recipe, reading in this process."""
    return run_extraction(
        slides,
        store,
        backbone or tiny_backbone(),
        # one broken tile of a dozen is more than a cohort may hold, and less than these slides are for
        **{"recipe": TILES, "isolation": False, "runtime": "torch", "max_invalid": 1.0} | keywords,  # type: ignore[arg-type]
    )


def outcomes(report) -> dict[str, str]:
    return {outcome.slide_id: outcome.outcome for outcome in report.outcomes}


def reasons(report) -> dict[str, str]:
    return {outcome.slide_id: outcome.reason for outcome in report.failed}


def lines(report) -> list[dict]:
    return [json.loads(line) for line in report.log.read_text(encoding="utf-8").splitlines()]


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the tiles that are embedded, padding included."""
    seen: list[int] = []
    embed = Backbone.embed

    def count(self: Backbone, tiles: np.ndarray) -> np.ndarray:
        seen.append(len(tiles))
        return embed(self, tiles)

    monkeypatch.setattr(Backbone, "embed", count)
    return seen


# ---------------------------------------------------------------- a run


def test_every_tile_on_tissue_is_embedded_bit_for_bit_as_alone(slides: Path, store: Path):
    backbone = tiny_backbone()
    report = extract(slides, store, backbone, batch_size=3)
    assert outcomes(report) == {"a": "embedded", "b": "embedded", "sité 2/c d": "embedded"}
    assert report.entry == "tiny"
    opened = open_store(store)
    assert opened.slide_ids("tiny") == ["a", "b", "sité 2/c d"]
    for outcome in report.outcomes:
        reader = opened[outcome.slide_id]
        stored, coords = reader.features("tiny"), reader.coords("tiny")
        assert len(stored) == len(coords) == outcome.n_tiles > 0
        with Slide(Path(outcome.path)) as slide:
            plan = plan_read(0.5, slide.downsamples, 0.5, TILES.tile_px)
            for (x, y), row in zip(coords, stored, strict=True):
                batch = np.zeros((3, 64, 64, 3), dtype=np.uint8)
                batch[0] = slide.read_tile(int(x), int(y), plan)
                assert np.array_equal(backbone.embed(batch)[0].astype(np.float16), row)


def test_the_log_has_a_line_for_every_slide_and_one_for_the_run(slides: Path, store: Path):
    report = extract(slides, store)
    log = lines(report)
    assert sorted(line["slide_id"] for line in log[:-1]) == ["a", "b", "sité 2/c d"]
    assert all(line["outcome"] == "embedded" and line["mpp"]["source"] == "openslide.mpp" for line in log[:-1])
    assert log[-1]["run"]["tiles"] == sum(outcome.n_tiles for outcome in report.outcomes)
    assert log[-1]["run"]["batch_size"] > 0
    assert report.log.parent == store / "runs"


def test_progress_hears_of_every_slide_and_tile(slides: Path, store: Path):
    heard: dict[str, list] = {"start": [], "tiles_done": [], "slide_done": []}

    class Listener:
        def start(self, n_slides: int) -> None:
            heard["start"].append(n_slides)

        def tiles_done(self, n: int, stats: StreamStats) -> None:
            assert stats.bottleneck in ("opening slides", "reading", "backbone", "writing")
            heard["tiles_done"].append(n)

        def slide_done(self, outcome: SlideOutcome) -> None:
            heard["slide_done"].append(outcome)

        def warn(self, text: str) -> None:
            raise AssertionError(text)

    report = extract(slides, store, progress=Listener())
    assert heard["start"] == [3]
    assert sum(heard["tiles_done"]) == sum(outcome.n_tiles for outcome in report.outcomes)
    assert sorted(outcome.slide_id for outcome in heard["slide_done"]) == ["a", "b", "sité 2/c d"]


def test_two_entries_share_one_tiling(slides: Path, store: Path):
    extract(slides, store)
    tiles = tree(store / "tiles", ())
    report = extract(slides, store, tiny_backbone(dim=9), entry="wide")
    assert set(outcomes(report).values()) == {"embedded"}
    assert tree(store / "tiles", ()) == tiles
    opened = open_store(store)
    assert opened.entries() == ["tiny", "wide"]
    assert len(opened["a"].features("tiny")) == len(opened["a"].features("wide"))


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("efficientnet_lite0", "efficientnet_lite0"),
        ("hf-hub:MahmoodLab/UNI", "hf-hub-mahmoodlab-uni"),
        ("ViT Größe", "vit-gr--e"),
        ("...", "features"),
    ],
)
def test_an_entry_is_named_after_its_backbone(name: str, entry: str):
    assert entry_name(name) == entry


def test_a_recipe_can_be_given_as_keywords(slides: Path, store: Path):
    run_extraction(
        slides, store, tiny_backbone(), mpp=0.5, tile_px=64, min_tissue_fraction=0.5, isolation=False, runtime="torch"
    )
    assert open_store(store).tile_recipe == TileRecipe(mpp=0.5, tile_px=64, min_tissue_fraction=0.5)


# ---------------------------------------------------------------- slides that fail


def test_slides_that_fail_do_not_stop_the_others_and_say_why(tmp_path: Path, slides: Path, store: Path):
    (slides / "empty.svs").touch()
    (slides / "text.svs").write_text("no slide")
    write_slide(slides / "no mpp.tif", mpp=None)
    write_slide(slides / "small.tif", 60, 60, levels=1)
    write_slide(slides / "coarse.tif", mpp=2.0)
    write_pyramid(slides / "white.tif", np.full((300, 300, 3), 255, dtype=np.uint8), 0.5, levels=1)
    report = extract(slides, store)
    assert {name for name, outcome in outcomes(report).items() if outcome == "embedded"} == {"a", "b", "sité 2/c d"}
    expected = {
        "empty": "0 bytes",
        "text": "no whole slide that OpenSlide reads",
        "no mpp": "--default-mpp",
        "small": "--tile-px",
        "coarse": "upsampling",
        "white": "--tissue none",
    }
    failed = reasons(report)
    assert set(failed) == set(expected)
    for name, part in expected.items():
        assert part in failed[name]
        assert "→" in failed[name]
    logged = {line["slide_id"]: line for line in lines(report)[:-1]}
    assert {name: logged[name]["reason"] for name in expected} == failed
    assert open_store(store).slide_ids() == ["a", "b", "sité 2/c d"]
    # the other slides can be mended later and only they are embedded
    write_slide(slides / "no mpp.tif", mpp=0.5)
    again = extract(slides, store)
    assert {name for name, outcome in outcomes(again).items() if outcome == "embedded"} == {"no mpp"}


def test_an_unexpected_error_of_one_slide_is_logged_with_its_trace(
    slides: Path, store: Path, monkeypatch: pytest.MonkeyPatch
):
    from extract.tiling.tiles import cut_slide as cut

    def surprise(slide: Slide, slide_id: str, *arguments: object):
        if slide_id == "b":
            raise ZeroDivisionError("surprise")
        return cut(slide, slide_id, *arguments)

    monkeypatch.setattr("extract.reading.reader.cut_slide", surprise)
    report = extract(slides, store)
    assert reasons(report) == {"b": "unexpected ZeroDivisionError: surprise"}
    line = next(line for line in lines(report) if line.get("slide_id") == "b")
    assert "surprise(slide" in line["traceback"] or "in surprise" in line["traceback"]


def test_no_slide_at_all_is_an_error_and_makes_no_store(tmp_path: Path, store: Path):
    with pytest.raises(SlideTableError):
        extract(tmp_path, store)
    assert not store.exists()


@pytest.mark.parametrize(("mpp", "contexts"), [(0.5, (0.25,)), (0.5, (2.0, 0.5)), (None, (0.0,)), (0.5, (np.nan,))])
def test_a_context_that_no_slide_can_have_makes_no_store(
    slides: Path, store: Path, mpp: float | None, contexts: tuple[float, ...]
):
    with pytest.raises(RecipeError, match="--context-mpp"):
        extract(slides, store, recipe=replace(TILES, mpp=mpp), context_mpp=contexts)
    assert not store.exists()


@pytest.mark.parametrize("format", ["zarr", "h5"])
def test_a_run_that_cuts_nothing_leaves_no_new_store(slides: Path, store: Path, format: str):
    report = extract(slides, store, recipe=replace(TILES, mpp=0.1), format=format)
    assert report.count("failed") == 3
    assert not store.exists()
    (slides / "text.svs").write_text("not a slide")
    assert extract(slides, store, format=format).count("failed") == 1
    assert extract([slides / "text.svs"], store).log.exists()


def test_an_empty_store_stays_where_it_is_not_ours_alone(
    slides: Path, store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    broken = slides / "text.svs"
    broken.write_text("not a slide")
    start = Store.start_run

    def with_another(self: Store) -> object:
        log = start(self)
        (self.path / "runs" / "other.jsonl").touch()
        return log

    with monkeypatch.context() as patch:
        patch.setattr(ZarrStore, "start_run", with_another)
        extract([broken], store)
    assert open_store(store).slide_ids() == []
    # a surprise: its trace is in the log
    monkeypatch.setattr("extract.reading.reader.cut_slide", lambda *arguments: 1 / 0)
    report = extract([slides / "a.tif"], tmp_path / "new.zarr")
    assert "ZeroDivisionError" in lines(report)[0]["traceback"]


def test_claims_are_given_back_when_a_slide_fails_after_them(
    slides: Path, store: Path, monkeypatch: pytest.MonkeyPatch
):
    claimed = []

    def fail(self: object, slide: object, tiles: object, drafts: dict[str, object]) -> None:
        raise MemoryError

    note = ExtractionRun._note

    def look(self: ExtractionRun, source: SlideSource, *arguments: object, **keywords: object) -> None:
        claimed.append((self._store.is_claimed(source.slide_id, "tiny"), len(self._claims), dict(self._slides)))
        note(self, source, *arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(Preparation, "_make_claimed_jobs", fail)
    monkeypatch.setattr(ExtractionRun, "_note", look)
    assert extract([slides / "a.tif"], store).count("failed") == 1
    assert claimed == [(False, 0, {})]


def test_a_slide_that_another_completed_meanwhile_leaves_no_trace(
    slides: Path, store: Path, monkeypatch: pytest.MonkeyPatch
):
    extract([slides / "a.tif"], store)
    kept = []
    there, claim, claimed = Store.has_features, Claims.open, []
    monkeypatch.setattr(Store, "has_features", lambda self, *unit: bool(claimed) and there(self, *unit))
    monkeypatch.setattr(Claims, "open", lambda self, *a: claimed.append(1) or claim(self, *a))
    finished = ExtractionRun._report
    monkeypatch.setattr(
        ExtractionRun, "_report", lambda self, *a: kept.append(dict(self._slides)) or finished(self, *a)
    )
    monkeypatch.setattr(ExtractionRun, "_check_executions", lambda self, sources: None)
    assert extract([slides / "a.tif"], store).count("complete") == 1
    assert kept == [{}]


def test_nothing_is_ink_on_a_dark_slide(tmp_path: Path, store: Path):
    glow = np.zeros((300, 400, 3), dtype=np.uint8)
    glow[40:260:6, 40:360:6, 2] = glow[41:261:6, 40:360:6, 2] = 250
    write_pyramid(tmp_path / "glow.tif", glow, 0.5, levels=1)
    write_pyramid(tmp_path / "ink.tif", np.where(glow > 0, glow, 245).astype(np.uint8), 0.5, levels=1)
    heard = []
    progress = Silent()
    progress.warn = heard.append  # type: ignore[method-assign]
    recipe = replace(TILES, tissue=TissueRecipe(method="saturation", exclude_pen=False))
    report = extract([tmp_path / "glow.tif"], store, recipe=recipe, progress=progress)
    assert report.count("embedded") == 1, report.outcomes
    assert "pen" not in report.outcomes[0].flagged
    assert len(heard) == 1
    assert "fluorescence" in heard[0]


def test_a_broken_tile_is_listed_and_dropped_by_readers(slides: Path, store: Path, tmp_path: Path):
    extract(slides, tmp_path / "whole.zarr")
    break_tile(slides / "b.tif", 128, 128)
    report = extract(slides, store)
    outcome = next(outcome for outcome in report.outcomes if outcome.slide_id == "b")
    assert outcome.outcome == "embedded"
    assert outcome.n_invalid == 1
    whole, hurt = open_store(tmp_path / "whole.zarr")["b"], open_store(store)["b"]
    row = next(i for i, corner in enumerate(hurt.coords().tolist()) if corner == [128, 128])
    assert hurt.feature_record("tiny")["invalid_rows"] == [row]
    assert (hurt._all_features("tiny")[row] == 0).all()
    keep = {tuple(corner): row for row, corner in enumerate(whole.coords().tolist())}
    rows = [keep[tuple(corner)] for corner in hurt.coords("tiny").tolist() if tuple(corner) in keep]
    assert [128, 128] not in hurt.coords("tiny").tolist()
    assert len(hurt.features("tiny")) == len(hurt.coords("tiny")) == outcome.n_tiles - 1
    common = [i for i, corner in enumerate(hurt.coords("tiny").tolist()) if tuple(corner) in keep]
    assert np.array_equal(hurt.features("tiny")[common], whole.features("tiny")[rows])


def test_a_slide_without_a_readable_tile_fails(slides: Path, store: Path, monkeypatch: pytest.MonkeyPatch):
    from extract.errors import TileDecodeError

    read = Slide.read_tile

    def broken(self: Slide, *arguments: object, **keywords: object) -> np.ndarray:
        if self.name == "b":
            raise TileDecodeError("broken")
        return read(self, *arguments, **keywords)

    monkeypatch.setattr(Slide, "read_tile", broken)
    report = extract(slides, store)
    assert list(reasons(report)) == ["b"]
    assert "no readable tile" in reasons(report)["b"]
    assert open_store(store).slide_ids("tiny") == ["a", "sité 2/c d"]


@pytest.mark.parametrize("scale", [1e6, float("nan")])
def test_values_that_do_not_fit_fail_with_the_flag_to_use(slides: Path, store: Path, scale: float):
    report = extract(slides, store, tiny_backbone(scale=scale))
    assert report.count("failed") == 3
    part = "--dtype float32" if scale == 1e6 else "NaN"
    assert all(part in reason and "'" + name + "'" in reason for name, reason in reasons(report).items())
    assert open_store(store).slide_ids("tiny") == []
    if scale == 1e6:
        wide = extract(slides, store, tiny_backbone(scale=scale, dtype="float32"), entry="wide")
        assert wide.count("embedded") == 3


def test_a_value_that_does_not_fit_stops_its_slide_at_the_first_batch(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
):
    seen = counting(monkeypatch)
    file = write_slide(tmp_path / "large.tif", 1600, 1200)
    report = extract([file], store, tiny_backbone(scale=1e6), batch_size=4)
    assert report.failed[0].n_tiles > 200
    assert sum(seen) < 150


def test_a_file_name_that_is_not_utf_8_does_not_stop_the_others(slides: Path, store: Path):
    try:
        shutil.copy(slides / "a.tif", os.fsencode(slides) + b"/Pr\xe4parat.tif")
    except OSError:
        pytest.skip("this file system refuses such names")
    report = extract(slides, store)
    assert report.count("embedded") >= 3


@pytest.mark.parametrize("content", [b"", b"{}", b"[]"])
def test_a_damaged_tiles_record_of_one_slide_does_not_stop_the_others(slides: Path, store: Path, content: bytes):
    extract([slides / "a.tif"], store)
    (store / "tiles" / "a" / "zarr.json").write_bytes(content)
    report = extract(slides, store)
    assert list(reasons(report)) == ["a"]
    assert report.count("embedded") == 2


# ---------------------------------------------------------------- again


def test_a_second_run_embeds_nothing_and_changes_nothing(slides: Path, store: Path, monkeypatch: pytest.MonkeyPatch):
    extract(slides, store)
    before, seen = tree(store), counting(monkeypatch)
    report = extract(slides, store)
    assert seen == []
    assert report.count("complete") == 3
    assert all(outcome.n_tiles > 0 and outcome.mpp for outcome in report.outcomes)
    assert tree(store) == before


def test_only_what_is_new_is_embedded(slides: Path, store: Path, monkeypatch: pytest.MonkeyPatch):
    extract([slides / "a.tif"], store, batch_size=4)
    tiles_of_a, seen = tree(store / "features"), counting(monkeypatch)
    report = extract(slides, store)
    new = sum(outcome.n_tiles for outcome in report.outcomes if outcome.outcome == "embedded")
    assert outcomes(report)["a"] == "complete"
    assert sum(seen) == -(-new // 4) * 4
    after = tree(store / "features")
    assert {name: after[name] for name in tiles_of_a} == tiles_of_a


def test_one_run_and_many_give_the_same_bytes(slides: Path, tmp_path: Path):
    extract(slides, tmp_path / "one.zarr")
    for file in sorted(slides.rglob("*.tif"), reverse=True):
        # ids are relative to the folder: a table keeps them
        table = tmp_path / "t.csv"
        slide_id = file.relative_to(slides).with_suffix("").as_posix()
        table.write_text(f"path,slide_id\n{file},{slide_id}\n", encoding="utf-8")
        extract([], tmp_path / "many.zarr", table=table)
    assert tree(tmp_path / "one.zarr") == tree(tmp_path / "many.zarr")


def test_a_resumed_entry_keeps_its_batch_size(slides: Path, store: Path):
    extract([slides / "a.tif"], store, batch_size=5)
    report = extract(slides, store)
    assert lines(report)[-1]["run"]["batch_size"] == 5
    records = [open_store(store)[s].feature_record("tiny") for s in ("a", "b")]
    assert {record["execution"]["batch_size"] for record in records} == {5}
    assert len({record["execution_fingerprint"] for record in records}) == 1


def test_two_runs_at_once_on_one_store_both_succeed(slides: Path, tmp_path: Path):
    extract(slides, tmp_path / "one.zarr")
    ZarrStore.create(tmp_path / "two.zarr", TILES)
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda _: extract(slides, tmp_path / "two.zarr"), range(2)))
    assert [report.failed for report in reports] == [(), ()]
    assert tree(tmp_path / "two.zarr") == tree(tmp_path / "one.zarr")


def test_killed_runs_end_byte_identical_to_an_uninterrupted_one(tmp_path: Path):
    slides = tmp_path / "slides"
    for number in range(6):
        write_slide(slides / f"{number}.tif", 900, 700, seed=number)
    break_tile(slides / "3.tif", 256, 256)
    rounds = int(os.environ.get("TESSERA_CRASH_ROUNDS", "8"))
    command = [
        sys.executable,
        "-m",
        "tests.test_extract.crash_extraction",
        str(slides),
        str(tmp_path),
        str(rounds),
        "2",
    ]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120 + 10 * rounds, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["hits"] >= rounds // 3
    whole = tree(tmp_path / "whole")
    assert len(open_store(tmp_path / "whole").slide_ids("tiny")) == 6
    for folder in tmp_path.glob("killed-*"):
        killed = tree(folder)
        assert sorted(whole) == sorted(killed)
        assert [name for name in whole if whole[name] != killed[name]] == []


def start_child(slides: Path, store: Path, *arguments: str) -> subprocess.Popen:
    """An extraction of its own process that saves after every batch and takes its time."""
    command = [sys.executable, "-m", "tests.test_extract.slow_extraction", str(slides), str(store), *arguments]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def await_rows(store: Path, n_bytes: int = 400) -> None:
    """Wait until a draft holds some rows."""
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size >= n_bytes for path in store.glob("features/*/~*.rows")):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_run_that_is_ended_inside_a_slide_goes_on_there(tmp_path: Path, store: Path, how: signal.Signals):
    slides = tmp_path / "slides"
    write_slide(slides / "a.tif", 900, 700, seed=1)
    write_slide(slides / "b.tif", 400, 300, seed=2)
    break_tile(slides / "a.tif", 256, 256)
    extract(slides, tmp_path / "whole.zarr", batch_size=4)
    child = start_child(slides, store)
    await_rows(store)
    child.send_signal(how)
    assert child.wait(timeout=60) == {signal.SIGKILL: -9}.get(how, 130)
    assert open_store(store).slide_ids("tiny") == []
    report = extract(slides, store, batch_size=4)
    resumed = {outcome.slide_id: outcome.n_resumed for outcome in report.outcomes}
    assert resumed["a"] >= 16
    assert report.outcomes[0].n_invalid == 1
    assert tree(store) == tree(tmp_path / "whole.zarr")
    assert not list(store.rglob("~*"))


@pytest.mark.parametrize("stopped", [False, True])
def test_a_second_signal_ends_the_readers_too_even_one_that_is_stopped(tmp_path: Path, store: Path, stopped: bool):
    slides = tmp_path / "slides"
    write_slide(slides / "a.tif", 900, 700, seed=1)
    child = start_child(slides, store)
    await_rows(store)
    tasks = Path(f"/proc/{child.pid}/task").iterdir()
    (reader,) = {int(pid) for task in tasks for pid in (task / "children").read_text().split()}
    if stopped:
        os.kill(reader, signal.SIGSTOP)
    child.send_signal(signal.SIGINT)
    time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=30) == 130
    deadline = time.monotonic() + 10
    while is_running(reader):
        assert time.monotonic() < deadline, "the reader was left behind"
        time.sleep(0.05)
    child.communicate()
    assert extract(slides, store, batch_size=4).count("embedded") == 1


def is_running(pid: int) -> bool:
    """Whether there is such a process that is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_slide_that_another_process_is_at_work_on_is_left_to_it(tmp_path: Path, store: Path):
    slides = tmp_path / "slides"
    for number in range(8):
        write_slide(slides / f"{number}.tif", 600, 500, seed=number)
    child = start_child(slides, store)
    await_rows(store)
    report = extract(slides, store, batch_size=4)
    assert child.wait(timeout=120) == 0
    printed = json.loads(child.communicate()[0])
    assert report.failed == ()
    # each slide was embedded once, some by either
    assert report.count("embedded") + printed["embedded"] == 8
    assert 0 < report.count("embedded") < 8
    extract(slides, tmp_path / "whole.zarr", batch_size=4)
    assert tree(store) == tree(tmp_path / "whole.zarr")


def test_a_slide_whose_worker_lives_on_is_reported(slides: Path, store: Path, monkeypatch: pytest.MonkeyPatch):
    extract([slides / "a.tif"], store)
    opened = ZarrStore(store)
    shutil.rmtree(store / "features" / "tiny" / "a")
    draft = opened.draft("tiny", "a", tiny_backbone().execution(4))
    monkeypatch.setattr("extract.pipeline.run.LEASE_S", 0.5)
    report = extract(slides, store)
    assert outcomes(report) == {"a": "elsewhere", "b": "embedded", "sité 2/c d": "embedded"}
    assert "at work on" in report.outcomes[0].reason
    draft.discard()
    assert outcomes(extract(slides, store))["a"] == "embedded"


# ---------------------------------------------------------------- a process of its own, several entries


def test_isolation_changes_no_byte(slides: Path, tmp_path: Path):
    break_tile(slides / "b.tif", 128, 128)
    (slides / "text.svs").write_text("no slide")
    reports = [extract(slides, tmp_path / f"{on}.zarr", isolation=on, views=1) for on in (False, True)]
    assert reasons(reports[0]) == reasons(reports[1])
    assert tree(tmp_path / "False.zarr") == tree(tmp_path / "True.zarr")


def test_slides_that_kill_or_stall_the_reader_cost_only_themselves(
    slides: Path, store: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ReaderProcess, "module", "tests.test_extract.hostile_reader")
    for name in ("cut-segv", "cut-hang", "segv-1", "segv-0-1-2-3-4-5", "hang-3", "greedy-2"):
        write_slide(slides / f"{name}.tif", 640, 320, seed=9, levels=1)
    recipe = replace(TILES, tissue=TissueRecipe(method="none"))
    limits = ReaderLimits(memory_bytes=4 << 30, cut_s=3, read_s=3)
    report = extract(slides, store, recipe=recipe, isolation=True, limits=limits)
    assert set(reasons(report)) == {"cut-segv", "cut-hang", "segv-0-1-2-3-4-5", "greedy-2"}
    assert "SIGSEGV" in reasons(report)["cut-segv"]
    assert "stood still" in reasons(report)["cut-hang"]
    assert "--reader-memory" in reasons(report)["greedy-2"]
    invalid = {outcome.slide_id: outcome.n_invalid for outcome in report.outcomes if outcome.outcome == "embedded"}
    assert invalid == {"a": 0, "b": 0, "sité 2/c d": 0, "segv-1": 1, "hang-3": 1}
    assert open_store(store)["segv-1"].feature_record("tiny")["invalid_rows"] == [1]


def test_backbones_views_and_contexts_are_entries_of_one_pass(slides: Path, store: Path):
    report = extract(slides, store, [tiny_backbone(), tiny_backbone(dim=9, backbone="wide")], views=2, context_mpp=(1,))
    names = [f"{name}{part}" for name in ("tiny", "wide") for part in ("", "@context-1", "@view-1", "@view-2")]
    opened = open_store(store)
    assert sorted(report.entries) == opened.entries() == names
    for slide_id in opened.slide_ids():
        shapes = {name: opened[slide_id].features(name).shape for name in names}
        assert {shape[0] for shape in shapes.values()} == {len(opened[slide_id].coords())}
        assert not np.array_equal(opened[slide_id].features("tiny"), opened[slide_id].features("tiny@view-1"))
        assert not np.array_equal(opened[slide_id].features("tiny@view-1"), opened[slide_id].features("tiny@view-2"))
    assert opened.feature_recipe("tiny@context-1").context_mpp == 1
    # a view that is added later leaves the others as they are
    before = tree(store)
    extract(slides, store, views=3)
    after = tree(store)
    assert {name: after[name] for name in before} == before
    assert "tiny@view-3" in open_store(store).entries()


def test_context_tiles_show_the_surroundings_of_the_same_centres(tmp_path: Path, store: Path):
    file = write_slide(tmp_path / "a.tif", 1200, 900, levels=1)
    extract([file], store, context_mpp=(1.0,))
    reader = open_store(store)["a"]
    plan, coords = context_tiles(reader.record, reader.coords(), 1.0)
    backbone = tiny_backbone()
    inside = [i for i, (x, y) in enumerate(coords) if x >= 0 and y >= 0 and x < 1072 and y < 772]
    assert len(inside) > 20
    with Slide(file) as slide:
        for row in inside[::7]:
            x, y = (int(value) for value in coords[row])
            region = slide.read_region(x, y, 0, (128, 128)).astype(float)
            tile = np.floor(region.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3)) + 0.5).astype(np.uint8)
            batch = np.zeros((4, 64, 64, 3), dtype=np.uint8)
            batch[0] = tile
            assert np.array_equal(backbone.embed(batch)[0].astype(np.float16), reader.features("tiny@context-1")[row])
            centre = np.array(reader.coords()[row]) + 32
            assert np.abs(np.array([x, y]) + plan.tile_l0 / 2 - centre).max() <= 0.5


def test_the_same_entry_twice_is_refused_before_any_work(slides: Path, store: Path):
    with pytest.raises(RecipeError, match="each once"):
        extract(slides, store, [tiny_backbone(), tiny_backbone()])
    with pytest.raises(RecipeError, match="each once"):
        extract(slides, store, context_mpp=(1.0, 1.0))
    assert not store.exists()


def test_a_disk_that_fails_keeps_the_rows_and_is_tried_again(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
):
    file = write_slide(tmp_path / "a.tif", 1800, 1400)
    reads, pread, limit = [], os.pread, 1 << 30

    def fail(*arguments: int) -> bytes:
        reads.append(1)
        if len(reads) > limit:
            raise OSError(5, "Input/output error")
        return pread(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", fail)
        patch.setattr(TileCache, "get", lambda self, key, make: make())
        extract([file], tmp_path / "whole.zarr")
        # the tiles of the last rows, more than the ring holds before them
        limit = len(reads) - 60
        reads.clear()
        report = extract([file], store)
    assert "Input/output error" in reasons(report)["a"]
    assert open_store(store).slide_ids("tiny") == []
    again = extract([file], store)
    assert again.count("embedded") == 1
    assert again.outcomes[0].n_resumed > 0
    assert again.outcomes[0].n_invalid == 0
    assert tree(store) == tree(tmp_path / "whole.zarr")


def test_a_store_that_cannot_be_written_keeps_the_rows(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch):
    file = write_slide(tmp_path / "a.tif", 1800, 1400)

    def refuse(*_: object) -> None:
        raise StoreError("read-only") from PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("extract.store.formats.zarr_store.ZarrStore.write_features", refuse)
        assert "read-only" in reasons(extract([file], store))["a"]
    again = extract([file], store)
    assert again.outcomes[0].n_resumed > 0


def test_flags_of_tiles_are_recorded(tmp_path: Path, store: Path):
    image = tissue_image(640, 320, margin=0)
    image[:64, :64] = 250
    write_pyramid(tmp_path / "a.tif", image, 0.5, levels=1, tile_px=64)
    report = extract([tmp_path / "a.tif"], store, recipe=replace(TILES, tissue=TissueRecipe(method="none")))
    record = open_store(store)["a"].feature_record("tiny")
    assert record["flagged_rows"]["empty"] == [0]
    assert report.outcomes[0].flagged["empty"] == 1


def test_a_shard_embeds_its_part(slides: Path, store: Path):
    parts = [extract(slides, store, shard_text=f"{i}/2") for i in (1, 2)]
    assert all(report.failed == () for report in parts)
    assert sorted(name for report in parts for name in outcomes(report)) == ["a", "b", "sité 2/c d"]


def test_images_with_masks_are_cut_by_them(tmp_path: Path, store: Path):
    for number in (1, 2):
        Image.fromarray(tissue_image(320, 256, seed=number, margin=0)).save(tmp_path / f"img_{number:04d}.png")
        mask = np.zeros((256, 320), dtype=np.uint8)
        mask[:128, :128] = 255
        if number == 1:
            Image.fromarray(mask).save(tmp_path / f"mask_{number:04d}.png")
    report = extract(tmp_path, store, recipe=replace(TILES, mpp=None), masks="mask_{}.png", images="img_{}.png")
    assert outcomes(report) == {"img_0001": "embedded", "img_0002": "failed"}
    assert open_store(store)["img_0001"].coords().tolist() == [[0, 0], [64, 0], [0, 64], [64, 64]]
    # another mask is another cut
    mask[:] = 255
    Image.fromarray(mask).save(tmp_path / "mask_0001.png")
    again = extract(tmp_path, store, recipe=replace(TILES, mpp=None), masks="mask_{}.png", images="img_{}.png")
    assert "another mask" in reasons(again)["img_0001"]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("same_size", [False, True])
def test_a_changed_file_is_refused_and_the_others_go_on(slides: Path, store: Path, same_size: bool):
    extract(slides, store)
    before = tree(store)
    if same_size:
        break_tile(slides / "b.tif", 128, 128)
    else:
        write_slide(slides / "b.tif", seed=77)
    report = extract(slides, store)
    assert list(reasons(report)) == ["b"]
    assert "one id is one slide" in reasons(report)["b"]
    assert report.count("complete") == 2
    assert tree(store) == before


def test_a_changed_mpp_is_refused(slides: Path, store: Path, tmp_path: Path):
    table = tmp_path / "t.csv"
    table.write_text("slide_id,mpp\na,0.25\n")
    extract(slides, store, table=table)
    assert open_store(store)["a"].record["mpp"]["native"] == 0.25
    table.write_text("slide_id,mpp\na,0.3\n")
    report = extract(slides, store, table=table)
    assert list(reasons(report)) == ["a"]
    assert "0.3 µm/px" in reasons(report)["a"]
    assert "0.25" in reasons(report)["a"]


@pytest.mark.parametrize("in_file", [0.5, None])
def test_a_second_entry_reads_the_tiles_that_were_cut(tmp_path: Path, store: Path, in_file: float | None):
    """The slide table's mpp is given to the first run only; the second must read the same pixels, or refuse."""
    file, table = write_slide(tmp_path / "slides" / "a.tif", 800, 600, mpp=in_file), tmp_path / "t.csv"
    table.write_text("slide_id,mpp\na,0.25\n")
    extract([file], store, table=table)
    report = extract([file], store, entry="again", default_mpp=None if in_file else 0.5)
    if report.failed:
        assert "0.25" in reasons(report)["a"]
        return
    reader = open_store(store)["a"]
    assert np.array_equal(reader.features("again"), reader.features("tiny"))


@pytest.mark.parametrize("change", [{"tile_px": 32}, {"mpp": 1.0}, {"tissue": TissueRecipe(method="none")}])
def test_another_tile_recipe_is_refused_by_field_before_any_work(slides: Path, store: Path, change: dict):
    extract(slides, store)
    before = tree(store, ())
    with pytest.raises(RecipeMismatchError, match=next(iter(change))):
        extract(slides, store, recipe=replace(TILES, **change))
    assert tree(store, ()) == before


def test_another_feature_recipe_is_refused_by_field_before_any_work(slides: Path, store: Path):
    extract(slides, store)
    before = tree(store, ())
    with pytest.raises(RecipeMismatchError, match=r"revision: 1 → 2.*--as"):
        extract(slides, store, tiny_backbone(revision="2"))
    assert tree(store, ()) == before


@pytest.mark.parametrize("value", [0.0, -0.5, float("nan"), float("inf")])
def test_a_senseless_default_mpp_is_refused_before_any_work(slides: Path, store: Path, value: float):
    with pytest.raises(ExtractError, match="default"):
        extract(slides, store, default_mpp=value)
    assert not store.exists()


def test_a_full_store_ends_the_run_and_keeps_what_is_finished(
    slides: Path, store: Path, monkeypatch: pytest.MonkeyPatch
):
    write = ZarrStore.write_features

    def full(self: ZarrStore, entry: str, slide_id: str, *arguments: object) -> None:
        if slide_id == "b":
            raise StoreFullError("got no space left → this unit needs about 1 MB → free some")
        write(self, entry, slide_id, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ZarrStore, "write_features", full)
        with pytest.raises(StoreFullError, match="needs about"):
            extract(slides, store)
    assert "b" not in open_store(store).slide_ids("tiny")
    report = extract(slides, store)
    assert open_store(store).slide_ids("tiny") == ["a", "b", "sité 2/c d"]
    assert outcomes(report)["b"] == "embedded"


def test_a_full_store_while_cutting_ends_the_run(slides: Path, store: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise StoreFullError("full")

    monkeypatch.setattr(ZarrStore, "write_tiles", full)
    with pytest.raises(StoreFullError):
        extract(slides, store)


# ---------------------------------------------------------------- tiles that were cut again


def recut(store: Path, slide_id: str) -> None:
    """Cut a slide's tiles again, other ones than its features were made from."""
    from tests.test_extract.small import tiles_unit

    opened = ZarrStore(store)
    reader = opened[slide_id]
    record = {key: value for key, value in reader.record.items() if key not in ("sha256", "n_tiles", "slide_id")}
    unit = tiles_unit(slide_id, 3)
    coords = np.array(reader.coords()[:3])
    shutil.rmtree(store / "tiles" / slide_id)
    opened.write_tiles(replace(unit, coords=coords, record=record))


def test_features_of_other_tiles_are_made_anew(slides: Path, store: Path):
    extract(slides, store)
    recut(store, "b")
    report = extract(slides, store)
    assert outcomes(report) == {"a": "complete", "b": "embedded", "sité 2/c d": "complete"}
    assert len(open_store(store)["b"].features("tiny")) == 3


def test_features_of_other_tiles_are_made_anew_for_the_first_slide_too(slides: Path, store: Path):
    extract(slides, store)
    recut(store, "a")
    report = extract(slides, store)
    assert outcomes(report)["a"] == "embedded"


def test_deleted_tiles_are_cut_anew(slides: Path, store: Path):
    extract(slides, store)
    shutil.rmtree(store / "tiles" / "a")
    report = extract(slides, store)
    assert report.count("failed") == 0


# ---------------------------------------------------------------- scales


def test_native_tiles_a_slide_without_mpp(tmp_path: Path, store: Path):
    file = write_slide(tmp_path / "bare.tif", mpp=None)
    report = extract([file], store, recipe=replace(TILES, mpp=None))
    assert report.outcomes[0].mpp == {"native": None, "requested": None, "achieved": None, "source": "missing"}
    assert report.count("embedded") == 1


def test_the_mpp_of_the_table_and_the_default_are_recorded(tmp_path: Path, store: Path):
    for name in ("x", "y"):
        write_slide(tmp_path / "slides" / f"{name}.tif", mpp=None)
    table = tmp_path / "t.csv"
    table.write_text("slide_id,mpp\nx,0.25\n")
    report = extract(tmp_path / "slides", store, table=table, default_mpp=0.5)
    assert [(o.mpp or {})["source"] for o in report.outcomes] == ["slide table", "--default-mpp"]
    assert [(o.mpp or {})["native"] for o in report.outcomes] == [0.25, 0.5]


def test_bounds_of_the_scan_are_respected(tmp_path: Path, store: Path, with_properties: Callable):
    file = tmp_path / "a.tif"
    write_pyramid(file, tissue_image(500, 400, margin=0), 0.5, levels=1, tile_px=64)
    bounds = {"x": "101", "y": "37", "width": "250", "height": "192"}
    with_properties({f"openslide.bounds-{name}": value for name, value in bounds.items()})
    extract([file], store)
    coords = open_store(store)["a"].coords()
    assert coords.min(axis=0).tolist() == [101, 37]
    assert (coords.max(axis=0) + 64).tolist() == [351, 229]


# ---------------------------------------------------------------- real slides


def test_real_slides_of_four_formats_and_broken_ones(data_folder: Path, tmp_path: Path):
    inputs = [data_folder / "slides" / name for name in ("CMU-1-Small-Region.svs", "broken")]
    report = extract(inputs, tmp_path / "s.zarr", recipe=TileRecipe(tile_px=256))
    assert outcomes(report) == {"CMU-1-Small-Region": "embedded", "broken": "failed", "unopenable": "failed"}
    dicom = extract(
        [data_folder / "slides" / "ezwsi_multiframe_camelyon.dcm"], tmp_path / "d.zarr", recipe=TileRecipe(29, 64)
    )
    assert dicom.count("embedded") == 1
    ndpi = extract(
        [data_folder / "slides" / "test3-DAPI-2-387.ndpi"],
        tmp_path / "n.zarr",
        recipe=TileRecipe(1.0, 256, tissue=TissueRecipe(method="none")),
    )
    assert ndpi.count("embedded") == 1
