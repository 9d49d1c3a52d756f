"""The report: everything of a run is on the page, nothing of a run is markup, nothing is asked of the network."""

import base64
import csv
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mil.errors import MissingExtraError, RunError
from mil.report import write_report
from mil.statistics import evaluate

SUBTYPES = ("HER2(+)", "Luminal A", "Luminal B", "Triple negative")
HOSTILE_IDS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "' onmouseover='alert(3)",
    "../../etc/passwd",
    "Schnitt Größe/плитка/切片 7",
    "\u202egnp.exe",
    "{{ 7 * 7 }}",
    "&lt;b&gt;",
)


def make_run(
    folder: Path,
    n_slides: int = 24,
    class_names: tuple[str, ...] = SUBTYPES,
    folds: int = 3,
    seeds: int = 2,
    epochs: int = 6,
    slide_ids: tuple[str, ...] = (),
    replicates: int = 50,
    **metrics: object,
) -> Path:
    """Write a run folder as `mil train` leaves it, with drawn numbers; `slide_ids` replace the first drawn ids."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    n_classes = len(class_names)
    ids = [*slide_ids, *(f"site/slide_{k:03d}" for k in range(n_slides))][:n_slides]
    patients = [f"P{k // 2:03d}" for k in range(n_slides)]
    labels = np.array([k // 2 % n_classes for k in range(n_slides)])
    logits = rng.normal(size=(n_slides, n_classes)) + 1.6 * np.eye(n_classes)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    predicted = probabilities.argmax(axis=1)
    fold_of = np.array([k // 2 % folds for k in range(n_slides)])
    replicas = [(fold, seed) for fold in range(folds) for seed in range(seeds)]

    with (folder / "oof.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["slide_id", "patient_id", "target", "predicted", *(f"p_{name}" for name in class_names)])
        for k in range(n_slides):
            row = [ids[k], patients[k], class_names[labels[k]], class_names[predicted[k]]]
            writer.writerow([*row, *probabilities[k]])
    with (folder / "splits.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["fold", "seed", "slide_id", "patient_id", "split"])
        for fold, seed in replicas:
            for k in range(n_slides):
                split = "test" if fold_of[k] == fold else "validation" if k % 5 == 0 else "train"
                writer.writerow([fold, seed, ids[k], patients[k], split])
    with (folder / "history.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = "replica fold seed epoch lr train_loss validation_loss validation_balanced_accuracy seconds"
        writer.writerow(names.split())
        for fold, seed in replicas:
            falling = 1.4 * np.exp(-np.arange(epochs) / 12) + 0.05 * rng.random(epochs)
            rising = falling + 0.012 * np.arange(epochs) + 0.15 * rng.random(epochs)
            for epoch in range(epochs):
                row = [f"fold{fold}-seed{seed}", fold, seed, epoch + 1, 1e-4, falling[epoch], rising[epoch]]
                writer.writerow([*row, 0.5, 0.8])
    document = {
        "target": "subtype",
        "class_names": list(class_names),
        "head": "abmil",
        "entry": "efficientnet_lite0",
        "n_replicas": len(replicas),
        "created": "2026-03-01T12:00:00+00:00",
        "versions": {"tessera-mil": "0.1.0", "torch": "2.15.0", "python": "3.11.9"},
        "cohort": {
            "attrition": [
                ["rows in the table", n_slides + 3, []],
                ["without a label", 1, ["site/unlabelled"]],
                ["without a slide in the store", 2, ["site/lost_1", "site/lost_2"]],
                ["kept", n_slides, []],
            ]
        },
        "warnings": ["class 'HER2(+)' is absent from the test part of fold 1"],
        "looks": 1,
        "out_of_fold": evaluate(labels, probabilities, patients, class_names, replicates=replicates),
        "per_replica": [
            {
                "replica": f"fold{fold}-seed{seed}",
                "fold": fold,
                "seed": seed,
                "best_epoch": int(rng.integers(epochs)) + 1,
                "epochs": epochs,
                "macro_f1": float(rng.uniform(0.5, 0.8)),
                "balanced_accuracy": float(rng.uniform(0.5, 0.8)),
                "auroc": None if fold == 1 else float(rng.uniform(0.7, 0.95)),
                "seconds": 42.0,
            }
            for fold, seed in replicas
        ],
    }
    (folder / "metrics.json").write_text(json.dumps(document | metrics), encoding="utf-8")
    config = "head:\n  name: abmil\n  hidden_dim: 128\noptimizer:\n  name: adamw\n  learning_rate: 0.0001\n"
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    return folder
