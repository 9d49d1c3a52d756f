"""The stream: batches across slides, rows that do not notice, and failures that stay where they belong."""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from extract.backbones import Backbone, load_backbone
from extract.engine import SlideJob, Stream, available_cores
from extract.errors import SlideUnreadableError, StoreFullError, TileDecodeError
from extract.geometry import plan_read, tile_grid
from extract.slide import Slide
from tests.test_extract.small import TinyModel, break_tile, feature_recipe, tiny_backbone, write_slide


class Counting(Backbone):
    """A tiny backbone that remembers the batches it got."""

    def __init__(self) -> None:
        import torch

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


def job(file: Path, tile_px: int = 64, dim: int = 6) -> SlideJob:
    slide = Slide(file, file.stem)
    plan = plan_read(0.5, slide.downsamples, 0.5, tile_px)
    coords = tile_grid((0, 0), slide.size_l0, plan).coords_l0()
    return SlideJob(file.stem, slide, coords, plan, np.zeros((len(coords), dim), dtype=np.float32))


def alone(backbone: Backbone, file: Path, batch_size: int, tile_px: int = 64) -> np.ndarray:
    """The embeddings of one slide by the plainest loop: its own tiles only, the last batch padded with zeros."""
    rows = []
    # as the stream does on a CPU: the last bits depend on the number of threads
    torch.set_num_threads(1)
    this = job(file, tile_px, backbone.recipe.dim)
    for start in range(0, len(this.coords), batch_size):
        pixels = np.zeros((batch_size, tile_px, tile_px, 3), dtype=np.uint8)
        corners = this.coords[start : start + batch_size]
        for i, (x, y) in enumerate(corners):
            pixels[i] = this.slide.read_tile(int(x), int(y), this.plan)
        rows.append(backbone.embed(pixels)[: len(corners)])
    this.slide.close()
    return np.concatenate(rows)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 64])
def test_rows_are_bit_for_bit_those_of_each_slide_alone(files: list[Path], batch_size: int):
    backbone, done = tiny_backbone(), {}
    Stream(backbone, batch_size, lambda job: done.update({job.slide_id: job.features})).run(map(job, files))
    assert sorted(done) == [file.stem for file in files]
    for file in files:
        assert np.array_equal(done[file.stem], alone(backbone, file, batch_size))


def test_rows_of_the_default_backbone_are_bit_for_bit_those_of_each_slide_alone(files: list[Path]):
    backbone, done = load_backbone(tile_px=64), {}
    stream = Stream(backbone, 4, lambda job: done.update({job.slide_id: job.features}))
    stream.run(job(file, 64, 1280) for file in files[1:4])
    for file in files[1:4]:
        assert np.array_equal(done[file.stem], alone(backbone, file, 4))


def test_batches_span_slides_and_all_have_one_size(files: list[Path]):
    backbone, counts = Counting(), []
    stream = Stream(backbone, 9, lambda job: None, counts.append)
    stream.run(map(job, files))
    total = sum(len(job(file).coords) for file in files)
    assert total % 9 != 0
    assert len(backbone.batches) == -(-total // 9)
    assert set(backbone.batches) == {(9, 64, 64, 3)}
    assert sum(counts) == stream.stats.tiles == total
    assert stream.stats.bottleneck in ("reading", "backbone")


def test_no_job_at_all_is_fine():
    stream = Stream(tiny_backbone(), 4, lambda job: None)
    stream.run([])
    assert stream.stats.tiles == 0


def test_slides_are_written_one_at_a_time_and_closed(files: list[Path]):
    threads, closed = set(), []

    def write(job: SlideJob) -> None:
        threads.add(threading.get_ident())
        closed.append(job.slide._idle.empty())
        assert job.rows_left == 0

    Stream(tiny_backbone(), 4, write).run(map(job, files))
    assert len(threads) == 1
    assert closed == [True] * len(files)


def test_a_broken_tile_is_listed_and_its_row_is_zero(files: list[Path]):
    backbone = tiny_backbone()
    whole = alone(backbone, files[0], 4)
    break_tile(files[0], 128, 128)
    done: dict[str, SlideJob] = {}
    Stream(backbone, 4, lambda job: done.update({job.slide_id: job})).run(map(job, files))
    hurt = done["0"]
    x, y = hurt.coords.T
    hit = np.flatnonzero((x > 64) & (x < 192) & (y > 64) & (y < 192))
    assert sorted(hurt.invalid_rows) == hit.tolist() != []
    assert (hurt.features[hit] == 0).all()
    rest = np.setdiff1d(np.arange(len(x)), hit)
    assert np.array_equal(hurt.features[rest], whole[rest])
    assert all(not job.invalid_rows for name, job in done.items() if name != "0")


def test_a_slide_that_stops_being_readable_ends_alone(files: list[Path], monkeypatch: pytest.MonkeyPatch):
    backbone, done, read = tiny_backbone(), {}, Slide.read_tile

    def vanish(self: Slide, x_l0: int, y_l0: int, plan: object) -> np.ndarray:
        if self.name == "0" and y_l0 > 100:
            raise SlideUnreadableError("gone")
        return read(self, x_l0, y_l0, plan)

    monkeypatch.setattr(Slide, "read_tile", vanish)
    Stream(backbone, 4, lambda job: done.update({job.slide_id: job})).run(map(job, files))
    assert [name for name, job in sorted(done.items()) if job.error] == ["0"]
    assert np.array_equal(done["2"].features, alone(backbone, files[2], 4))


@pytest.mark.parametrize("error", [ValueError("odd"), OSError(5, "Input/output error"), MemoryError()], ids=repr)
def test_a_surprise_while_reading_one_slide_does_not_cost_the_others(
    files: list[Path], monkeypatch: pytest.MonkeyPatch, error: Exception
):
    read, done = Slide.read_tile, {}

    def surprise(self: Slide, *arguments: object) -> np.ndarray:
        if self.name == "0":
            raise error
        return read(self, *arguments)

    monkeypatch.setattr(Slide, "read_tile", surprise)
    Stream(tiny_backbone(), 4, lambda job: done.update({job.slide_id: job})).run(map(job, files))
    assert done["0"].error is not None
    assert len(done) == len(files)


def test_every_tile_of_a_slide_may_be_broken(files: list[Path], monkeypatch: pytest.MonkeyPatch):
    def broken(self: Slide, *_: object) -> np.ndarray:
        raise TileDecodeError("broken")

    monkeypatch.setattr(Slide, "read_tile", broken)
    done: list[SlideJob] = []
    Stream(tiny_backbone(), 4, done.append).run(map(job, files))
    assert all(len(job.invalid_rows) == len(job.coords) and (job.features == 0).all() for job in done)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("where", ["on_slide", "on_tiles", "backbone", "jobs"])
def test_a_failure_of_the_run_ends_it_and_is_raised(files: list[Path], where: str, monkeypatch: pytest.MonkeyPatch):
    error, calls = StoreFullError("full"), []

    def fail(*_: object) -> None:
        calls.append(1)
        raise error

    def jobs():
        for number in range(40):
            if where == "jobs" and number == 2:
                fail()
            yield replace(job(files[1]), slide_id=str(number))

    backbone = tiny_backbone()
    if where == "backbone":
        monkeypatch.setattr(backbone, "embed", fail)
    stream = Stream(
        backbone, 4, fail if where == "on_slide" else lambda job: None, fail if where == "on_tiles" else lambda n: None
    )
    with pytest.raises(StoreFullError, match="full"):
        stream.run(jobs())
    # it stopped early: what was in flight is done, forty slides are not
    assert 1 <= len(calls) <= 25


def test_the_number_of_threads_of_torch_is_put_back(files: list[Path]):
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        Stream(tiny_backbone(), 4, lambda job: None).run(map(job, files))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert available_cores() >= 1
