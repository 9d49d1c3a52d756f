"""Quality on a real cohort: the last epoch's AUROC on the test folds, without any choice made on them.

Each contestant is trained on the training part of every fold for the same number of epochs; the test slides of all
folds are scored once. Ours are the recipes of the speed comparison, ABMIL with every setting at its default, and ABMIL
in the settings of torchmil's, which tells the recipe from the library. Whatever the store holds may be given; the
tables show GlaS.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks import our_recipe, torchmil_peer
from benchmarks.common_recipe import LR, CommonRecipe, write_slides
from benchmarks.machine import Result
from benchmarks.our_recipe import Recipe
from benchmarks.quality_curve import Task, follow
from benchmarks.torchmil_peer import TorchmilPeer
from extract.store import open_store
from mil.bags import choose_entry
from mil.cohort import join_store, read_cohort
from mil.splits import make_splits

FOLDS = 5
EPOCHS, OUR_LR = 40, 1e-3
DEFAULTS = Recipe("tessera ABMIL, every setting at its default", {"head": "abmil", "optimizer": {"lr": 5e-4}})
THEIRS = Recipe(
    "tessera in the settings of torchmil's ABMIL",
    {
        "head": {"name": "abmil", "embed_dim": None, "attention_dim": 128, "gated": False, "dropout": 0.0},
        "optimizer": {"name": "adam", "lr": LR, "weight_decay": 0.0},
        "scheduler": "constant",
        "batch_bags": 1,
        "instance_budget": None,
        "standardize": "none",
        "class_weights": "none",
        "grad_clip": None,
    },
)


def fold_tasks(store_path: Path, labels: Path, target: str, device: torch.device) -> list[Task]:
    """One task per fold, whose validation slides are the fold's test part."""
    store = open_store(store_path)
    entry = choose_entry(store)
    cohort = join_store(read_cohort(labels, target), store.slide_ids(entry))
    bags = [np.array(store[slide_id].features(entry)) for slide_id in cohort.slide_ids]
    splits = make_splits(cohort, FOLDS, 0, [0])
    tasks = []
    for fold in range(FOLDS):
        parts = splits.parts(fold, 0)
        training, test = (np.flatnonzero(parts == part) for part in ("train", "test"))
        n_classes = len(cohort.class_names)
        tasks.append(Task(cohort.slide_ids, bags, cohort.labels, training, test, n_classes, device))
    return tasks


def compare(
    store: Path, labels: Path, target: str, seeds: int, recipes: Sequence[Recipe], device: torch.device
) -> list[Result]:
    """AUROC over the test folds, averaged, per seed: the common recipe, torchmil's ABMIL, and our recipes."""
    tasks = fold_tasks(store, labels, target, device)
    subject = f"{store.stem}, {len(tasks[0].bags)} slides, {FOLDS} folds"
    with tempfile.TemporaryDirectory() as folder:
        paths = write_slides(tasks[0], Path(folder))
        common = CommonRecipe(paths)
        rows = [_row(subject, "common recipe", tasks, seeds, lambda task, seed: _follow(common, task, seed))]
    if torchmil_peer.is_installed():
        peer = TorchmilPeer("abmil", 1)
        peer.prepare(tasks[0])
        rows.append(_row(subject, "torchmil ABMIL", tasks, seeds, lambda task, seed: _follow(peer, task, seed)))
    for recipe in (*recipes, DEFAULTS, THEIRS):

        def final(task: Task, seed: int, recipe: Recipe = recipe) -> float:
            return our_recipe.train(recipe, task, OUR_LR, seed, EPOCHS).final

        rows.append(_row(subject, recipe.name, tasks, seeds, final))
    return rows


def _follow(contestant: CommonRecipe | TorchmilPeer, task: Task, seed: int) -> float:
    return follow(contestant, task, LR, seed, EPOCHS).final


def _row(subject: str, name: str, tasks: Sequence[Task], seeds: int, final: Callable[[Task, int], float]) -> Result:
    """A fold whose test part holds one class has no AUROC."""
    judged = [task for task in tasks if len(np.unique(task.labels[task.validation])) > 1]
    scores = [float(np.mean([final(task, seed) for task in judged])) for seed in range(seeds)]
    return Result.of(subject, f"{name}: mean test AUROC of {len(judged)} folds, last epoch", "", scores)
