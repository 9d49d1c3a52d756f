"""The benchmarks run: one small step of each, so that they never rot."""

import csv
from pathlib import Path

import pytest

from benchmarks import bench_demo, bench_first_end
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
