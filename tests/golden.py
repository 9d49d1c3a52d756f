"""The four tasks trained, scored, compared, swept, packed and applied on a tiny store, as plain values.

`tests/data/golden` keeps what they were; ``python -m tests.golden`` writes it anew, which is right only where numbers
are meant to change. Reached through public names alone, so that the rooms behind them may be rebuilt.
"""

import csv
import hashlib
import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch

import mil
from extract.store import Execution, FeatureRecipe, TileRecipe, TilesUnit, TransformRecipe, create_store
from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "tests" / "data" / "golden"
DIM, SLIDES, PATIENTS = 6, 36, 24
TARGETS = {"classification": "subtype", "multilabel": "er,her2", "regression": "ki67", "survival": "months,died"}
SELECT = {"classification": "auroc", "multilabel": "macro_auroc", "regression": "r2", "survival": "concordance"}
VOLATILE = {
    "created", "trained", "packed", "key", "versions", "files", "sha256",
    "seconds", "seconds_per_replica", "peak_bytes", "peak_mb", "inference_ms", "inference_ms_per_slide",
}  # fmt: skip
"""Keys and columns of what differs from call to call."""

DATED = ("| trained", "| packed")
"""Begin the lines of a model card that say when."""

LEFT_OUT = (".zarr/", "/trials/", "/members/", ".jsonl", ".html", ".svg", ".png", ".lock", "/other.csv", "/labels.csv")
"""What of a path is not kept: what was given, and what is made of the rest."""

WEIGHTS = "sha256:"
"""Begins what stands for weights, which are the same to the byte only on a machine of the same kind."""

SAME_AS = "= "
"""Begins the name of a file that held the same."""


def make_golden(task: str, folder: Path) -> dict[str, Any]:
    """Do everything with one task under ``folder``; returns file → plain values."""
    store, labels = make_store(folder / "cohort.zarr", seed=0), make_labels(folder / "labels.csv", seed=0)
    cohort = mil.read_cohort(labels, TARGETS[task], task=task)
    head = {"name": "abmil", "embed_dim": 8, "attention_dim": 4}
    options: dict[str, Any] = {"folds": 3, "epochs": 4, "optimizer": {"lr": 0.02}, "device": "cpu"}
    runs = [folder / "runs" / name for name in ("abmil", "max")]
    for run, each in zip(runs, (head, "max"), strict=True):
        mil.train(store, cohort, head=each, seeds=2, **options).save(run)
    mil.benchmark(store, cohort, heads=["mean", head], seeds=1, out=folder / "board", **options)
    space = {"optimizer.lr": [0.005, 0.02]}
    options.pop("optimizer")
    mil.sweep(store, cohort, space, out=folder / "sweep", select=SELECT[task], seeds=1, head=head, **options)
    comparison = mil.compare_runs(runs, replicates=200)
    (folder / "comparison.json").write_text(json.dumps(asdict(comparison), default=str), encoding="utf-8")
    mil.make_ensemble(runs).save(folder / "ensemble")
    mil.score_runs([*runs, folder / "ensemble"]).save(folder / "scores")
    mil.pack(runs[0], folder / "model")
    mil.pack(folder / "ensemble", folder / "packed")
    other, truth = make_store(folder / "other.zarr", seed=1), make_labels(folder / "other.csv", seed=1)
    for name in ("model", "packed"):
        mil.evaluate_external(folder / name, other, truth, device="cpu").save(folder / f"external-{name}")
        mil.predict(folder / name, other, device="cpu").write_csv(folder / f"predicted-{name}.csv")
    return read_tree(folder)


def make_store(path: Path, seed: int) -> Any:
    """36 slides of 3 to 9 tiles, whose mean shift decides every target."""
    transform = TransformRecipe(224, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    recipe = FeatureRecipe(
        backbone="tiny", architecture="tiny", revision="1", weights_sha256="0" * 64, pooling="avg",
        transform=transform, dim=DIM,
    )  # fmt: skip
    store = create_store(path, TileRecipe())
    store.create_entry("tiny", recipe)
    execution = Execution("fp32", "torch", "cpu", 4, {"torch": "2"})
    rng = np.random.default_rng([seed, 1])
    for at, hidden in enumerate(_hidden(seed)):
        n = int(rng.integers(3, 10))
        coords = np.stack([512 * np.arange(n), np.zeros(n)], axis=1).astype(np.int32)
        mpp = {"native": 0.5, "requested": 0.5, "achieved": 0.5, "source": "openslide.mpp"}
        thumbnail = rng.integers(0, 255, (9, 12, 3), dtype=np.uint8)
        unit = TilesUnit(_slide(seed, at), coords, np.ones(n, dtype=np.float32), thumbnail, {"mpp": mpp})
        store.write_tiles(unit)
        matrix = rng.normal(size=(n, DIM)) + np.r_[1.5 * hidden, np.zeros(DIM - 2)]
        store.write_features("tiny", unit.slide_id, matrix.astype(np.float16), [], execution)
    return store


def make_labels(path: Path, seed: int) -> Path:
    """The label table of `make_store`: every target, patients of one or two slides, some labels unknown."""
    hidden = _hidden(seed)
    rng = np.random.default_rng([seed, 2])
    names = ["Luminal A", "Luminal B", "triple-negative"]
    rows: list[list[object]] = [["slide_id", "patient_id", "subtype", "er", "her2", "ki67", "months", "died"]]
    by_patient = {at % PATIENTS: at for at in reversed(range(SLIDES))}
    died = rng.random(PATIENTS) < 0.7
    for at in range(SLIDES):
        patient = at % PATIENTS
        x, y = hidden[by_patient[patient]]
        subtype = names[0 if x > 0.3 else 1 if y > 0 else 2]
        her2 = "" if at % 7 == 0 else int(y > 0)
        ki67, months = f"{20 + 5 * x:.3f}", f"{10 * np.exp(-x):.3f}"
        rows.append(
            [_slide(seed, at), f"p{seed}-{patient}", subtype, int(x > 0), her2, ki67, months, int(died[patient])]
        )
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def _slide(seed: int, at: int) -> str:
    return f"cohort{seed}/slide {seed}-{at:02d}"


def _hidden(seed: int) -> Any:
    """[slides, 2]; slides of a patient are alike."""
    return np.random.default_rng([seed, 0]).normal(size=(PATIENTS, 2))[np.arange(SLIDES) % PATIENTS]


def read_tree(folder: Path) -> dict[str, Any]:
    """Every file of results under a folder as plain values, without what differs from call to call."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        alike = path.parent.name == "checkpoints" and path.suffix == ".json" and path.stem != "fold0-seed0"
        if path.is_file() and not alike and not any(part in f"/{name}" for part in LEFT_OUT):
            found |= {name: _read(path, str(folder))}
    return found


def _read(path: Path, folder: str) -> Any:
    """A file as plain values."""
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            return [_plain(row, folder) for row in csv.DictReader(file)]
    if path.suffix == ".safetensors":
        return WEIGHTS + hashlib.sha256(path.read_bytes()).hexdigest()
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return _plain(json.loads(text), folder)
    return [line for line in text.replace(folder, "<folder>").splitlines() if not line.startswith(DATED)]


def _plain(value: Any, folder: str) -> Any:
    """A value of a file without volatile keys and without the folder's name."""
    if isinstance(value, dict):
        return {key: _plain(each, folder) for key, each in value.items() if key not in VOLATILE}
    if isinstance(value, list):
        return [_plain(each, folder) for each in value]
    return value.replace(folder, "<folder>") if isinstance(value, str) else value


def machine() -> str:
    """What the last bits of a number depend on."""
    cpu = Path("/proc/cpuinfo")
    models = [line for line in cpu.read_text().splitlines() if line.startswith("model name")] if cpu.is_file() else []
    name = models[0].split(":")[1].strip() if models else platform.processor()
    return f"{name}, torch {torch.__version__}, numpy {np.__version__}, scikit-learn {sklearn.__version__}"


def read_golden(task: str) -> tuple[dict[str, Any], str]:
    """What `make_golden` once returned, and on which `machine`."""
    kept = json.loads((FOLDER / f"{task}.json").read_text(encoding="utf-8"))
    files: dict[str, Any] = {}
    for name, value in kept["files"].items():
        same = isinstance(value, str) and value.startswith(SAME_AS)
        files[name] = files[value.removeprefix(SAME_AS)] if same else _table(value)
    return files, kept["machine"]


def write_golden(task: str, found: dict[str, Any]) -> None:
    """Keep what `make_golden` returned; a table as its header and its rows, what stood there before as its name."""
    lines, seen = [], dict[str, str]()
    for name, value in found.items():
        text = json.dumps(_rows(value), ensure_ascii=False)
        first = seen.setdefault(text, name)
        lines.append(f"{json.dumps(name)}: {text if first == name else json.dumps(SAME_AS + first)}")
    kept = f'{{"machine": {json.dumps(machine())}, "files": {{\n' + ",\n".join(lines) + "\n}}\n"
    (FOLDER / f"{task}.json").write_text(kept, encoding="utf-8")


def _rows(value: Any) -> Any:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {"header": list(value[0]), "rows": [list(row.values()) for row in value]}
    return value


def _table(value: Any) -> Any:
    if isinstance(value, dict) and list(value) == ["header", "rows"]:
        return [dict(zip(value["header"], row, strict=True)) for row in value["rows"]]
    return value


def main() -> None:
    """Write every task's values anew."""
    import tempfile

    FOLDER.mkdir(parents=True, exist_ok=True)
    for task in sys.argv[1:] or TARGETS:
        with tempfile.TemporaryDirectory() as folder:
            write_golden(task, make_golden(task, Path(folder).resolve()))


if __name__ == "__main__":
    main()
