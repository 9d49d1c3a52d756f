"""The stream: batches across slides, rows that do not notice, and failures that stay where they belong."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from extract.backbones.backbone import Backbone, load_backbone
from extract.errors import SlideUnreadableError, StoreFullError, TileDecodeError
from extract.geometry import plan_read, tile_grid
from extract.pipeline.jobs import Column, SlideJob, StreamStats, available_cores, ring_slots
from extract.pipeline.stream import Stream
from extract.reading.readers import LocalReaders, reading_threads
from extract.reading.ring import Ring, RingShape
from extract.slides.slide import Slide
from extract.store import AugmentRecipe
from tests.test_extract.small import TinyModel, break_tile, feature_recipe, tiny_backbone, write_slide


class Counting(Backbone):
    """A tiny backbone that remembers the batches it got."""

    def __init__(self) -> None:
        super().__init__(TinyModel(6, 1.0), feature_recipe(), torch.device("cpu"))
        self.batches: list[tuple[int, ...]] = []

    def embed(self, tiles: np.ndarray) -> np.ndarray:
        self.batches.append(tiles.shape)
        return super().embed(tiles)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Five slides of different sizes."""
    sizes = [(400, 300), (130, 140), (300, 420), (64, 64), (500, 200)]
    return [write_slide(tmp_path / f"{i}.tif", *size, seed=i, levels=1) for i, size in enumerate(sizes)]


def job(file: Path, backbone: Backbone, tile_px: int = 64, columns: tuple[Column, ...] = ()) -> SlideJob:
    with Slide(file, file.stem) as slide:
        plan = plan_read(0.5, slide.downsamples, 0.5, tile_px)
        coords = tile_grid((0, 0), slide.size_l0, plan).coords_l0()
    columns = columns or (Column("tiny", backbone),)
    features = tuple(np.full((len(coords), c.backbone.recipe.dim), 7.0, dtype=np.float32) for c in columns)
    return SlideJob(file.stem, file, coords, plan, columns, features)


def stream(
    backbone: Backbone,
    batch_size: int,
    jobs: Iterable[SlideJob | None],
    on_slide: Callable[[SlideJob], None] = lambda job: None,
    on_tiles: Callable[[int], None] = lambda n: None,
    stopped: Callable[[], bool] = lambda: False,
    tile_px: int = 64,
) -> StreamStats:
    """Run jobs through a stream that reads in this process."""
    cpu = torch.device("cpu")
    ring = Ring(RingShape(ring_slots(cpu), batch_size, tile_px, reading_threads(2)))
    readers = LocalReaders(ring)
    try:
        running = Stream(ring, readers, cpu, on_slide, on_tiles, stopped)
        running.run(jobs)
    finally:
        readers.close()
        ring.close()
    return running.stats


def collect(backbone: Backbone, batch_size: int, files: Iterable[Path]) -> dict[str, SlideJob]:
    """Jobs by slide id, done; all with the same column."""
    done: dict[str, SlideJob] = {}
    columns = (Column("tiny", backbone),)
    stream(
        backbone,
        batch_size,
        [job(file, backbone, columns=columns) for file in files],
        lambda job: done.update({job.slide_id: job}),
    )
    return done


def alone(backbone: Backbone, file: Path, batch_size: int, tile_px: int = 64) -> np.ndarray:
    """The embeddings of one slide by the plainest loop: its own tiles only, the last batch padded with zeros."""
    rows = []
    # as the stream does on a CPU: the last bits depend on the number of threads
    torch.set_num_threads(1)
    this, slide = job(file, backbone, tile_px), Slide(file, file.stem)
    for start in range(0, len(this.coords), batch_size):
        pixels = np.zeros((batch_size, tile_px, tile_px, 3), dtype=np.uint8)
        corners = this.coords[start : start + batch_size]
        for i, (x, y) in enumerate(corners):
            pixels[i] = slide.read_tile(int(x), int(y), this.plan)
        rows.append(backbone.embed(pixels)[: len(corners)])
    slide.close()
    return np.concatenate(rows)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 64])
def test_rows_are_bit_for_bit_those_of_each_slide_alone(files: list[Path], batch_size: int):
    backbone = tiny_backbone()
    done = collect(backbone, batch_size, files)
    assert sorted(done) == [file.stem for file in files]
    for file in files:
        assert np.array_equal(done[file.stem].features[0], alone(backbone, file, batch_size))


def test_rows_of_the_default_backbone_are_bit_for_bit_those_of_each_slide_alone(files: list[Path]):
    backbone = load_backbone(tile_px=64)
    done = collect(backbone, 4, files[1:4])
    for file in files[1:4]:
        assert np.array_equal(done[file.stem].features[0], alone(backbone, file, 4))


def test_batches_span_slides_and_all_have_one_size(files: list[Path]):
    backbone, counts = Counting(), []
    column = (Column("tiny", backbone),)
    stats = stream(backbone, 9, [job(file, backbone, columns=column) for file in files], on_tiles=counts.append)
    total = sum(len(job(file, backbone).coords) for file in files)
    assert total % 9 != 0
    assert len(backbone.batches) == -(-total // 9)
    assert set(backbone.batches) == {(9, 64, 64, 3)}
    assert sum(counts) == stats.tiles == total
    assert stats.bottleneck in ("opening slides", "reading", "backbone", "writing")
    assert 0 < stats.device_busy <= 1


def test_several_backbones_and_views_see_each_tile_once(files: list[Path], monkeypatch: pytest.MonkeyPatch):
    one, two = tiny_backbone(), tiny_backbone(dim=9)
    view = tiny_backbone(augment=AugmentRecipe(), view="view-1")
    columns = (Column("one", one), Column("two", two), Column("one@view-1", view, 1))
    reads, read_tile, done = [], Slide.read_tile, {}

    def count(self: Slide, *arguments: object, **keywords: object) -> np.ndarray:
        reads.append(arguments)
        return read_tile(self, *arguments, **keywords)

    jobs = [job(file, one, columns=columns) for file in files]
    with monkeypatch.context() as patch:
        patch.setattr(Slide, "read_tile", count)
        stream(one, 4, jobs, lambda job: done.update({job.slide_id: job}))
    assert len(reads) == sum(len(job.coords) for job in jobs)
    for file in files:
        features = done[file.stem].features
        assert np.array_equal(features[0], alone(one, file, 4))
        assert np.array_equal(features[1], alone(two, file, 4))
        assert features[2].shape == features[0].shape
        assert not np.array_equal(features[2], features[0])


def test_views_do_not_depend_on_batches(files: list[Path]):
    backbone = tiny_backbone(augment=AugmentRecipe(), view="view-2")
    results = []
    for batch_size, order in ((3, files), (8, files[::-1])):
        done: dict[str, SlideJob] = {}
        columns = (Column("tiny@view-2", backbone, 2),)
        jobs = [job(file, backbone, columns=columns) for file in order]
        for each in jobs:
            each.seed = each.slide_id
        stream(backbone, batch_size, jobs, lambda job, done=done: done.update({job.slide_id: job}))
        results.append(done)
    for name in results[0]:
        assert np.allclose(results[0][name].features[0], results[1][name].features[0], rtol=1e-5)


def test_slides_with_other_columns_do_not_share_batches(files: list[Path]):
    one, two, done = Counting(), Counting(), {}
    first, second = (Column("one", one),), (Column("two", two),)
    jobs = [job(file, one, columns=first if i % 2 else second) for i, file in enumerate(files)]
    stream(one, 4, jobs, lambda job: done.update({job.slide_id: job}))
    assert len(done) == len(files)
    for number, (backbone, remainder) in enumerate(((two, 0), (one, 1))):
        total = sum(len(job.coords) for i, job in enumerate(jobs) if i % 2 == remainder)
        assert len(backbone.batches) == -(-total // 4), number


def test_rows_that_were_saved_are_not_computed_again(files: list[Path]):
    backbone = Counting()
    resumed = replace(job(files[0], backbone), first_row=11)
    done: list[SlideJob] = []
    stream(backbone, 4, [resumed], done.append)
    assert len(backbone.batches) == -(-(len(resumed.coords) - 11) // 4)
    assert (done[0].features[0][:11] == 7.0).all()
    assert np.array_equal(done[0].features[0][11:], alone(backbone, files[0], 4)[11:])


def test_a_job_whose_rows_are_all_saved_is_only_written(files: list[Path]):
    backbone = Counting()
    whole = job(files[1], backbone)
    done: list[SlideJob] = []
    stream(backbone, 4, [replace(whole, first_row=len(whole.coords))], done.append)
    assert backbone.batches == []
    assert len(done) == 1


def test_a_run_that_is_stopped_finishes_what_is_under_way_and_saves(files: list[Path], monkeypatch: pytest.MonkeyPatch):
    saved: list[tuple[str, int]] = []

    class Draft:
        def __init__(self, name: str) -> None:
            self.name = name

        def save(self, features: np.ndarray, invalid_rows: list[int], flags: np.ndarray) -> None:
            assert (features != 7.0).any(axis=1).all()
            assert len(flags) == len(features)
            saved.append((self.name, len(features)))

    backbone, counts, written = tiny_backbone(), [], []
    columns = (Column("tiny", backbone),)
    jobs = [replace(job(file, backbone, columns=columns), drafts=(Draft(file.stem),)) for file in files]
    stats = stream(
        backbone, 4, jobs, lambda job: written.append(job.slide_id), counts.append, lambda: sum(counts) >= 20
    )
    assert 20 <= stats.tiles < sum(len(job.coords) for job in jobs)
    assert stats.tiles == sum(counts)
    kept = sum(n for _, n in saved) + sum(len(job.coords) for job in jobs if job.slide_id in written)
    assert kept == stats.tiles


def test_a_pause_among_the_jobs_sends_what_has_come(files: list[Path]):
    backbone, done = tiny_backbone(), []

    def jobs() -> Iterator[SlideJob | None]:
        first = job(files[1], backbone)
        assert len(first.coords) % 16
        yield first
        yield None
        deadline = time.monotonic() + 20
        while not done:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield job(files[2], backbone)

    stream(backbone, 16, jobs(), lambda job: done.append(job.slide_id))
    assert done == ["1", "2"]


def test_no_job_at_all_is_fine():
    assert stream(tiny_backbone(), 4, []).tiles == 0


def test_slides_are_written_one_at_a_time(files: list[Path]):
    threads = set()
    backbone = tiny_backbone()

    def write(job: SlideJob) -> None:
        threads.add(threading.get_ident())
        assert job.rows_left == 0

    stream(backbone, 4, [job(file, backbone) for file in files], write)
    assert len(threads) == 1


def test_a_broken_tile_is_listed_and_its_row_is_zero(files: list[Path]):
    backbone = tiny_backbone()
    whole = alone(backbone, files[0], 4)
    break_tile(files[0], 128, 128)
    done = collect(backbone, 4, files)
    hurt = done["0"]
    x, y = hurt.coords.T
    hit = np.flatnonzero((x > 64) & (x < 192) & (y > 64) & (y < 192))
    assert sorted(hurt.invalid_rows) == hit.tolist() != []
    assert (hurt.features[0][hit] == 0).all()
    rest = np.setdiff1d(np.arange(len(x)), hit)
    assert np.array_equal(hurt.features[0][rest], whole[rest])
    assert all(not job.invalid_rows for name, job in done.items() if name != "0")


def test_a_slide_that_stops_being_readable_ends_alone(files: list[Path], monkeypatch: pytest.MonkeyPatch):
    backbone, read = tiny_backbone(), Slide.read_tile

    def vanish(self: Slide, x_l0: int, y_l0: int, plan: object, **keywords: object) -> np.ndarray:
        if self.name == "0" and y_l0 > 100:
            raise SlideUnreadableError("gone")
        return read(self, x_l0, y_l0, plan, **keywords)

    monkeypatch.setattr(Slide, "read_tile", vanish)
    done = collect(backbone, 4, files)
    assert [name for name, job in sorted(done.items()) if job.error] == ["0"]
    assert isinstance(done["0"].error, SlideUnreadableError)
    assert np.array_equal(done["2"].features[0], alone(backbone, files[2], 4))


@pytest.mark.parametrize("error", [ValueError("odd"), OSError(5, "Input/output error"), MemoryError()], ids=repr)
def test_a_surprise_while_reading_one_slide_does_not_cost_the_others(
    files: list[Path], monkeypatch: pytest.MonkeyPatch, error: Exception
):
    read = Slide.read_tile

    def surprise(self: Slide, *arguments: object, **keywords: object) -> np.ndarray:
        if self.name == "0":
            raise error
        return read(self, *arguments, **keywords)

    monkeypatch.setattr(Slide, "read_tile", surprise)
    done = collect(tiny_backbone(), 4, files)
    assert done["0"].error is not None
    assert len(done) == len(files)


def test_every_tile_of_a_slide_may_be_broken(files: list[Path], monkeypatch: pytest.MonkeyPatch):
    def broken(self: Slide, *_: object, **keywords: object) -> np.ndarray:
        raise TileDecodeError("broken")

    monkeypatch.setattr(Slide, "read_tile", broken)
    for each in collect(tiny_backbone(), 4, files).values():
        assert len(each.invalid_rows) == len(each.coords)
        assert (each.features[0] == 0).all()


@pytest.mark.timeout(60)
def test_a_worker_that_cannot_work_ends_the_run(files: list[Path], monkeypatch: pytest.MonkeyPatch):
    def fail(self: Stream) -> None:
        raise RuntimeError("no device")

    monkeypatch.setattr(Stream, "_work_cpu", fail)
    backbone = tiny_backbone()
    with pytest.raises(RuntimeError, match="no device"):
        stream(backbone, 4, [job(file, backbone) for file in files])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("where", ["on_slide", "on_tiles", "backbone", "jobs"])
def test_a_failure_of_the_run_ends_it_and_is_raised(files: list[Path], where: str, monkeypatch: pytest.MonkeyPatch):
    error, calls = StoreFullError("full"), []
    backbone = tiny_backbone()

    def fail(*_: object) -> None:
        calls.append(1)
        raise error

    def jobs() -> Iterator[SlideJob]:
        for number in range(40):
            if where == "jobs" and number == 2:
                fail()
            yield replace(job(files[1], backbone), slide_id=str(number))

    if where == "backbone":
        monkeypatch.setattr(backbone, "embed", fail)
    with pytest.raises(StoreFullError, match="full"):
        stream(
            backbone,
            4,
            jobs(),
            fail if where == "on_slide" else lambda job: None,
            fail if where == "on_tiles" else lambda n: None,
        )
    # it stopped early: what was in flight is done, forty slides are not
    assert 1 <= len(calls) <= 25


def test_the_number_of_threads_of_torch_is_put_back(files: list[Path]):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        collect(tiny_backbone(), 4, files)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert available_cores() >= 1
