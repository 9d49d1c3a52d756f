"""Parity: an entry is continued on another device only by embeddings that agree, and the measure is told."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from extract.backbones.backbone import Backbone
from extract.errors import StoreError
from extract.pipeline.extraction import run_extraction
from extract.pipeline.parity import measure_parity
from extract.pipeline.report import Silent
from extract.slides.finding.source import SlideSource
from extract.store import open_store
from tests.test_extract.small import TILES, TinyModel, break_tile, feature_recipe, tiny_backbone, write_slide


class Other(Backbone):
    """The tiny backbone as if on another device, a little or much off."""

    def __init__(self, noise: float) -> None:
        super().__init__(TinyModel(6, 1.0), feature_recipe(), torch.device("cpu"))
        self.precision, self._noise = "bf16", noise

    def embed(self, tiles: np.ndarray) -> np.ndarray:
        rows = super().embed(tiles) if self._noise >= 0 else np.full((len(tiles), 6), np.nan, np.float32)
        return rows + np.random.default_rng(0).normal(size=rows.shape).astype(np.float32) * self._noise * rows.std()


class Warnings(Silent):
    """Collects warnings."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def warn(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    for number in range(2):
        write_slide(tmp_path / "slides" / f"{number}.tif", seed=number)
    break_tile(tmp_path / "slides" / "0.tif", 128, 128)
    return tmp_path / "slides"


def begin(slides: Path, store: Path) -> SlideSource:
    run_extraction(
        slides / "0.tif", store, tiny_backbone(), recipe=TILES, isolation=False, runtime="torch", context_mpp=(1.0,)
    )
    return SlideSource(slides / "0.tif", "0")


@pytest.mark.parametrize("entry", ["tiny", "tiny@context-1"])
def test_the_same_computation_agrees_exactly(slides: Path, tmp_path: Path, entry: str):
    source = begin(slides, tmp_path / "s.zarr")
    backbone = tiny_backbone(context_mpp=1.0 if "@" in entry else None)
    parity = measure_parity(open_store(tmp_path / "s.zarr")["0"], source, entry, backbone, 16)
    assert parity is not None
    assert parity.tiles == 16
    assert parity.least > 0.999999


def test_an_entry_is_continued_otherwise_with_the_measure_told_and_logged(slides: Path, tmp_path: Path):
    begin(slides, tmp_path / "s.zarr")
    progress = Warnings()
    report = run_extraction(
        slides,
        tmp_path / "s.zarr",
        Other(1e-3),
        recipe=TILES,
        isolation=False,
        runtime="torch",
        batch_size=8,
        progress=progress,
    )
    assert report.count("embedded") == 1
    assert len(progress.texts) == 1
    assert "precision: fp32 → bf16" in progress.texts[0]
    # runs of the same second share a log
    lines = [json.loads(line) for line in report.log.read_text().splitlines()]
    line = next(line["parity"] for line in lines if "parity" in line)
    assert 0.999 < line["mean"] < 1
    assert line["tiles"] == 8
    assert line["entry"] == "tiny"


@pytest.mark.parametrize("noise", [2.0, -1.0])
def test_embeddings_that_do_not_agree_are_refused_before_any_work(slides: Path, tmp_path: Path, noise: float):
    begin(slides, tmp_path / "s.zarr")
    with pytest.raises(StoreError, match=r"mean cosine .* --as"):
        run_extraction(
            slides, tmp_path / "s.zarr", Other(noise), recipe=TILES, isolation=False, runtime="torch", batch_size=8
        )
    assert open_store(tmp_path / "s.zarr").slide_ids("tiny") == ["0"]


def test_the_same_execution_is_not_measured(slides: Path, tmp_path: Path):
    begin(slides, tmp_path / "s.zarr")
    progress = Warnings()
    run_extraction(
        slides, tmp_path / "s.zarr", tiny_backbone(), recipe=TILES, isolation=False, runtime="torch", progress=progress
    )
    assert progress.texts == []
