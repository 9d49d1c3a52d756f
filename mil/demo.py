"""The whole job on a synthetic cohort: draw slides, embed them, train two heads, check what attention found."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from extract.store import Store, open_store
from mil.config.compose import compose_config
from mil.deployment.inference import predict
from mil.errors import RunError
from mil.experiments.crossval import run_training
from mil.runs.run import Run
from mil.statistics.paired_tests import PairedDifference, paired_difference
from mil.training.replicas import OnProgress

HEADS = ("mean", "abmil")
LESION_TILE = 0.25
"""A tile counts as lesion if a lesion covers at least this part of it."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes:
        runs: one run per head, in the order of `HEADS`.
        gain: macro-F1 of ABMIL minus that of mean pooling, with its paired interval over patients.
        lesion_auroc: mean over slides of the AUROC with which out-of-fold attention ranks lesion tiles first.
        n_slides: slides that hold lesion tiles and others, over which that mean is taken.
    """

    runs: tuple[Run, ...]
    gain: PairedDifference
    lesion_auroc: float
    n_slides: int


def draw_cohort(folder: Path, seed: int) -> Path:
    """Write the synthetic cohort into ``folder`` unless it is there; returns the folder of slides.

    Raises:
        RunError: the folder holds the cohort of another seed.
    """
    from extract.synthetic.cohort import make_cohort

    # the file written last; without it an interrupted drawing is drawn again
    if not (folder / "README.txt").is_file():
        make_cohort(folder, seed=seed)
    drawn = json.loads((folder / "lesions.json").read_text(encoding="utf-8"))["seed"]
    if drawn != seed:
        raise RunError(
            f"got seed {seed} for {folder} → it holds the cohort of seed {drawn} → give another folder with --out"
        )
    return folder / "slides"


def train_heads(
    store: Path, labels: Path, out: Path, overrides: Sequence[str], progress: Callable[[str], OnProgress]
) -> tuple[Run, ...]:
    """Train every head of `HEADS` with the same recipe and budget, into ``out/run-<head>``."""
    runs = []
    for head in HEADS:
        values = {"store": str(store), "labels": str(labels), "target": "subtype", "head": head}
        config = compose_config(overrides, values=values)
        runs.append(run_training(config, out / f"run-{head}", progress(head), overwrite=True))
    return tuple(runs)


def judge(store: Path, cohort_folder: Path, runs: tuple[Run, ...]) -> DemoResult:
    """Compare the heads, and the attention of the last one with the lesions that were planted."""
    mean, abmil = runs[0], runs[-1]
    cohort = abmil.cohort
    difference = paired_difference(
        cohort.labels, abmil.predictions.out_of_fold(), mean.predictions.out_of_fold(), cohort.patient_ids
    )
    areas = lesion_aurocs(open_store(store), cohort_folder, abmil)
    return DemoResult(runs, difference, float(np.mean(areas)), len(areas))


def lesion_aurocs(store: Store, cohort_folder: Path, run: Run) -> list[float]:
    """Per slide, the AUROC with which the attention of replicas that never saw its patient ranks lesion tiles first."""
    from sklearn.metrics import roc_auc_score

    from extract.synthetic.lesions import lesion_tiles, read_lesions

    lesions = read_lesions(cohort_folder / "lesions.json")
    areas = []
    for slide_id, attention in out_of_fold_attention(run, store).items():
        slide = store[slide_id]
        covered = lesion_tiles(lesions, slide_id, slide.coords(run.entry), slide.record["tile_l0"])
        truth = np.asarray(covered) >= LESION_TILE
        if truth.any() and not truth.all():
            areas.append(float(roc_auc_score(truth, attention)))
    return areas


def out_of_fold_attention(run: Run, store: Store) -> dict[str, np.ndarray]:
    """Attention [n_tiles] of every slide, mean over branches and over the replicas that had it in their test part."""
    if run.folder is None:
        raise ValueError("got a run that was not saved → expected one with a folder → call run.save(folder) first")
    found: dict[str, np.ndarray] = {}
    test_fold = run.splits.test_fold
    for fold in range(run.config.folds):
        slide_ids = [slide_id for slide_id, f in zip(run.cohort.slide_ids, test_fold, strict=True) if f == fold]
        names = [f"fold{fold}-seed{seed}" for seed in run.config.seeds]
        maps: Any = predict(run.folder, store, run.entry, slide_ids, replicas=names, attention=True).attention
        found |= {slide_id: weights.mean(axis=1) for slide_id, weights in maps.items()}
    return found
