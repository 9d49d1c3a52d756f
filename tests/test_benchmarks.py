"""The benchmarks run: one small step of each, so that they never rot."""

import csv
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import bench_demo, bench_extract, bench_first_end, bench_reading, bench_runtimes, bench_store
from extract.store import TileRecipe, TissueRecipe
from tests.test_extract.small import write_slide


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_first_end_measures_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slides = tmp_path / "slides"
    lines = ["slide_id,patient_id,label"]
    for i in range(10):
        write_slide(slides / f"s{i}.tif", 400, 400, mpp=0.62, seed=i)
        lines.append(f"s{i},p{i},{'ab'[i % 2]}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    arguments = ["--size-px", "700", "--repeats", "1", "--epochs", "2", "--out", str(tmp_path / "r.csv")]
    bench_first_end.main([*arguments, "--glas", str(slides), "--labels", str(tmp_path / "labels.csv")])
    rows = rows_of(tmp_path / "r.csv")
    metrics = {(row["subject"], row["metric"]) for row in rows}
    for subject in ("large slide", "glas"):
        assert {(subject, name) for name in ("reading alone", "backbone alone", "end to end")} <= metrics
    assert ("glas", "training epoch, abmil, one replica") in metrics
    assert all(float(row["median"]) > 0 and row["torch"] and row["cores"] for row in rows)


def test_demo_summarises_over_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from functools import partial

    from extract.synthetic import make_cohort

    small = partial(make_cohort, patients_per_class=3, slides_per_patient=1, size_l0=(512, 512))
    monkeypatch.setattr("extract.synthetic.make_cohort", small)
    out = str(tmp_path / "d.csv")
    rows = bench_demo.main(["--seeds", "1", "2", "--out", out, "folds=3", "seeds=1", "epochs=1", "device=cpu"])
    gains = [row.median for row in rows if row.metric == "gain in macro-F1" and row.subject != "all data seeds"]
    (summary,) = [row for row in rows if row.metric.startswith("gain in macro-F1, mean")]
    assert len(gains) == 2
    assert summary.median == pytest.approx(sum(gains) / 2)
    assert summary.low <= summary.median <= summary.high
    assert len(rows_of(tmp_path / "d.csv")) == len(rows)


def test_runtimes_are_timed_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_runtimes, "INPUT_PX", 64)
    arguments = ["--models", "test_resnet", "--batch-sizes", "2", "--repeats", "1", "--seconds", "0.01"]
    bench_runtimes.main([*arguments, "--out", str(tmp_path / "r.csv")])
    medians = {row["metric"]: float(row["median"]) for row in rows_of(tmp_path / "r.csv")}
    assert {"torch, batch 2", "torch, batch 2, CPU time", "torch, smallest cosine with torch"} <= set(medians)
    assert all(value > 0 for value in medians.values())
    assert min(value for metric, value in medians.items() if "cosine" in metric) > 0.9999


def test_reading_compares_pixels_and_rates(tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "small.tif", 640, 448)
    arguments = ["--size-px", "1500", "--tiles", "4", "--repeats", "1", "--out", str(tmp_path / "r.csv"), str(slide)]
    bench_reading.main(arguments)
    rows = rows_of(tmp_path / "r.csv")
    same = [float(row["median"]) for row in rows if "identical" in row["metric"]]
    assert same == [100] * 4
    assert {row["subject"] for row in rows} == {"large SVS", "small.tif"}
    assert sum(row["metric"].endswith("direct / OpenSlide") for row in rows) == 4
    assert all(float(row["median"]) > 0 for row in rows)


def test_extraction_is_compared_with_the_plain_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_extract, "PLAIN_BATCHES", (2,))
    sizes = ["--size-px", "512", "--large-px", "512", "--copies", "2", "--slides", "1", "2"]
    options = ["--repeats", "1", "--search-tiles", "4", "--runtimes", "torch"]
    bench_extract.main([*sizes, *options, "--out", str(tmp_path / "r.csv")])
    rows = rows_of(tmp_path / "r.csv")
    metrics = {row["metric"] for row in rows}
    assert {"plain pipeline, batch 64", "tessera, torch", "tessera, torch / plain at 64"} <= metrics
    assert {"rate, mean colour", "memory, this process and its reader"} <= metrics
    assert all(float(row["median"]) > 0 for row in rows)


def test_the_comparison_on_a_gpu_runs_on_a_cpu_too(tmp_path: Path) -> None:
    bench_reading.write_aperio(tmp_path / "a.svs", 512)
    options = Namespace(
        device="cpu", backbones=["test_resnet"], batches=[2, 4], repeats=1, precision="fp32", compile=False
    )
    recipe = TileRecipe(tile_px=64, tissue=TissueRecipe(method="none"))
    results = bench_extract.compare_on_gpu(options, [tmp_path / "a.svs"], recipe)
    assert [row.metric.split(",")[0] for row in results] == [
        "backbone alone",
        "backbone alone",
        "end to end",
        "end to end / backbone alone",
        "device busy",
    ]
    assert all(row.median > 0 for row in results)


def test_the_store_is_compared_with_other_layouts(tmp_path: Path) -> None:
    sizes = ["--rows", "64", "--dim", "8", "--slides", "2", "--picked", "4", "--listed", "3", "--repeats", "1"]
    bench_store.main([*sizes, "--dtypes", "float16", "--folder", str(tmp_path), "--out", str(tmp_path / "r.csv")])
    rows = rows_of(tmp_path / "r.csv")
    subjects = {row["subject"].partition(", ")[2] for row in rows if "float16" in row["subject"]}
    ours = {"tessera, zarr", "tessera, h5"}
    assert subjects - ours == {
        "memory copy",
        "torch .pt",
        "safetensors",
        "Zarr, defaults",
        "HDF5, contiguous",
        "HDF5, one row a chunk",
    }
    assert ours < subjects
    assert all(float(row["median"]) > 0 for row in rows)
    assert {row["subject"] for row in rows} >= {"checksums", "3 slides"}
