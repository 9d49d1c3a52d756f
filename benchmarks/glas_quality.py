"""Quality on a real cohort: AUROC on the test folds after the last epoch, with nothing chosen on them.

Every entrant is trained on the training part of every fold for the same number of epochs: the rivals, the recipes of
the speed comparison, ABMIL with every setting at its default, and ABMIL in the settings of torchmil's, which tells the
recipe from the library. Each stands at one learning rate, and at the one of a common grid whose runs rank the
*validation* part of the fold best on average over seeds; ours, and the rivals, once more with recipe and rate chosen
so. No training is handed a label from outside its training part. Where ours has the better of it: it has five recipes
to choose from where rivals are two, and the lowest rate of the usual grid is the rivals' own. Whatever a store holds
may be given; the tables show GlaS.

A difference to a rival comes with a percentile interval over patients, as seeds alone say nothing of new ones. It is
too narrow where a test fold is one patient, which never varies; a replicate averages over the folds that keep two
classes; the choice of rate and recipe is not drawn anew; and nothing is corrected for the number of differences.
"""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks import torchmil_peer
from benchmarks.common_recipe import LR, CommonRecipe, write_slides
from benchmarks.entrants import Entrant, our_entrant, rival_entrant
from benchmarks.machine import Result
from benchmarks.our_recipe import Recipe
from benchmarks.quality_curve import FloatArray, IntArray, Task
from benchmarks.torchmil_peer import TorchmilPeer
from extract.store import open_store
from mil.bags.stored import choose_entry
from mil.cohort.joining import join_store
from mil.cohort.reading import read_cohort
from mil.errors import TrainingDivergedError
from mil.splits.folds import make_splits
from mil.statistics.bootstrap import Spread
from mil.statistics.metrics import auroc

FOLDS = 5
EPOCHS = 40
COMMON, TORCHMIL = "common recipe", "torchmil ABMIL"
RIVALS = ("common", "torchmil-abmil")
DEFAULTS = Recipe("tessera ABMIL, every setting at its default", {"head": "abmil"})
THEIRS = Recipe(
    "tessera in the settings of torchmil's ABMIL",
    {
        "head": {"name": "abmil", "embed_dim": None, "attention_dim": 128, "gated": False, "dropout": 0.0},
        "optimizer": {"name": "adam", "weight_decay": 0.0},
        "scheduler": "constant",
        "batch_bags": 1,
        "instance_budget": None,
        "standardize": "none",
        "class_weights": "none",
        "grad_clip": None,
    },
)
OWN_LR = {COMMON: LR, TORCHMIL: LR, THEIRS.name: LR, DEFAULTS.name: 5e-4}
RECIPE_LR = 1e-3


@dataclass(frozen=True, eq=False)
class Fold:
    """One fold.

    Attributes:
        task: trains on the training part and is asked of all other slides, validation part first.
        validation: slides whose labels choose.
        test: slides that are judged.
    """

    task: Task
    validation: IntArray
    test: IntArray

    @property
    def is_judged(self) -> bool:
        """A test part of one class has no AUROC."""
        return len(np.unique(self.task.labels[self.test])) > 1


@dataclass(frozen=True, eq=False)
class Folds:
    """A cohort cut into folds.

    Attributes:
        name: of the store.
        patient_ids: [n].
        parts: one per fold.
    """

    name: str
    patient_ids: Sequence[str]
    parts: Sequence[Fold]

    @property
    def labels(self) -> IntArray:
        """int64 [n]."""
        return self.parts[0].task.labels

    @property
    def judged(self) -> list[int]:
        """The folds that have an AUROC."""
        return [index for index, fold in enumerate(self.parts) if fold.is_judged]


@dataclass(frozen=True, eq=False)
class Trained:
    """An entrant at one learning rate.

    Attributes:
        name: of the entrant.
        ours: else a rival's.
        lr: learning rate.
        said: probabilities [validation + test, C] of every judged fold, one per seed.
    """

    name: str
    ours: bool
    lr: float
    said: Mapping[int, Sequence[FloatArray]]

    def on_validation(self, fold: int, folds: Folds) -> tuple[float, float]:
        """How well a fold's runs do on its validation part, more being better: AUROC, then minus the loss."""
        labels = folds.labels[folds.parts[fold].validation]
        aurocs, losses = [], []
        for said in self.said[fold]:
            seen = said[: len(labels)]
            aurocs.append(np.nan_to_num(auroc(labels, seen)[0], nan=0.0))
            losses.append(-np.log(np.maximum(seen[np.arange(len(labels)), labels], 1e-12)).mean())
        return float(np.mean(aurocs)), -float(np.mean(losses))

    def on_test(self, fold: int, folds: Folds) -> list[FloatArray]:
        """Probabilities of the test part, one per seed."""
        return [said[len(folds.parts[fold].validation) :] for said in self.said[fold]]


@dataclass(frozen=True, eq=False)
class Judged:
    """Test probabilities of some way to train.

    Attributes:
        name: of the way.
        ours: else a rival's.
        folds: of the cohort.
        said: one array per seed for every judged fold.
        taken: entrant and learning rate of every judged fold.
    """

    name: str
    ours: bool
    folds: Folds
    said: Mapping[int, Sequence[FloatArray]]
    taken: Mapping[int, tuple[str, float]]

    def scores(self, weights: FloatArray | None = None) -> FloatArray:
        """Mean AUROC of the folds in which it is defined, [seeds, B], under weights [B, n]."""
        found = []
        for index, per_seed in self.said.items():
            test, labels = self.folds.parts[index].test, self.folds.labels
            drawn = None if weights is None else weights[:, test]
            found.append([auroc(labels[test], said, drawn) for said in per_seed])
        known = np.isfinite(found)
        counts = known.sum(axis=0)
        means: FloatArray = np.where(counts > 0, np.where(known, found, 0).sum(axis=0) / np.maximum(counts, 1), np.nan)
        return means


def read_folds(store_path: Path, labels: Path, target: str, device: torch.device) -> Folds:
    """The slides of a store that a label file names, cut into folds by patient."""
    store = open_store(store_path)
    entry = choose_entry(store)
    cohort = join_store(read_cohort(labels, target), store.slide_ids(entry))
    bags = [np.array(store[slide_id].features(entry)) for slide_id in cohort.slide_ids]
    splits = make_splits(cohort, FOLDS, 0, [0])
    found = []
    for fold in range(FOLDS):
        parts = splits.parts(fold, 0)
        training, validation, test = (np.flatnonzero(parts == part) for part in ("train", "validation", "test"))
        asked = np.concatenate([validation, test])
        task = Task(cohort.slide_ids, bags, cohort.labels, training, asked, len(cohort.class_names), device)
        found.append(Fold(task, validation, test))
    return Folds(store_path.stem, cohort.patient_ids, found)


def compare(
    folds: Folds, seeds: int, recipes: Sequence[Recipe], grid: Sequence[float], rivals: Sequence[str] = RIVALS
) -> list[Result]:
    """AUROC over the test folds, averaged, per seed, of everybody; the rates taken; our differences to the rivals."""
    single, chosen, candidates = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for entrant in _entrants(folds.parts[0].task, Path(folder), recipes, rivals):
            own_lr = OWN_LR.get(entrant.name, RECIPE_LR)
            trained = [_train(entrant, folds, lr, seeds) for lr in sorted({own_lr, *grid})]
            in_grid = [each for each in trained if each.lr in grid]
            single.append(judge(f"{entrant.name}, lr {own_lr:g}", folds, [t for t in trained if t.lr == own_lr]))
            chosen.append(judge(f"{entrant.name}, rate chosen", folds, in_grid))
            candidates += in_grid
            print(f"{single[-1].name}: {np.median(single[-1].scores()):.4f}", flush=True)
    for name, ours in (("rivals", False), ("tessera", True)):
        pool = [each for each in candidates if each.ours == ours]
        if len({each.name for each in pool}) > 1:
            chosen.append(judge(f"{name}, recipe and rate chosen", folds, pool))
    rows = [_row(way) for way in (*single, *chosen)]
    rows += [row for way in chosen for row in _taken(way)]
    for ways in (single, chosen):
        rows += [difference(way, rival) for rival in ways if not rival.ours for way in ways if way.ours]
    return rows


def _entrants(task: Task, folder: Path, recipes: Sequence[Recipe], rivals: Sequence[str]) -> Iterable[Entrant]:
    if "common" in rivals:
        paths = write_slides(task, folder)
        yield rival_entrant(COMMON, lambda: CommonRecipe(paths, fused=True), EPOCHS)
    if "torchmil-abmil" in rivals and torchmil_peer.is_installed():
        peer = TorchmilPeer("abmil", 1)
        peer.prepare(task)
        yield rival_entrant(TORCHMIL, lambda: peer, EPOCHS)
    for recipe in (*recipes, DEFAULTS, THEIRS):
        yield our_entrant(recipe, EPOCHS)


def _train(entrant: Entrant, folds: Folds, lr: float, seeds: int) -> Trained:
    """All judged folds and seeds at one learning rate."""
    said = {
        index: [_last(entrant, folds.parts[index].task, lr, seed) for seed in range(seeds)] for index in folds.judged
    }
    return Trained(entrant.name, entrant.ours, lr, said)


def _last(entrant: Entrant, task: Task, lr: float, seed: int) -> FloatArray:
    """What is said after the last epoch; a run that diverged says the same of all slides."""
    try:
        last = entrant.train(task, lr, seed).last
    except TrainingDivergedError:
        last = np.array(np.nan)
    return last if np.isfinite(last).all() else np.full((len(task.validation), task.n_classes), 1 / task.n_classes)


def judge(name: str, folds: Folds, candidates: Sequence[Trained]) -> Judged:
    """Every judged fold takes the candidate that does best on its validation part."""
    best = {index: max(candidates, key=lambda each: each.on_validation(index, folds)) for index in folds.judged}
    said = {index: each.on_test(index, folds) for index, each in best.items()}
    taken = {index: (each.name, each.lr) for index, each in best.items()}
    return Judged(name, candidates[0].ours, folds, said, taken)


def _row(way: Judged) -> Result:
    folds, scores = way.folds, way.scores()[:, 0]
    metric = f"{way.name}: mean test AUROC of {len(folds.judged)} folds, last epoch"
    return Result.of(_subject(folds), metric, "", scores.tolist())


def _taken(way: Judged) -> list[Result]:
    """Entrant and learning rate of every judged fold."""
    return [
        Result.of(_subject(way.folds), f"{way.name}: fold {fold} takes {name} at learning rate", "", [lr])
        for fold, (name, lr) in way.taken.items()
    ]


def difference(way: Judged, rival: Judged) -> Result:
    """Ours minus theirs, the mean over seeds, with the percentile interval of 95 % over patients; n counts patients."""
    folds = way.folds

    def statistic(weights: FloatArray | None) -> dict[str, FloatArray]:
        return {"auroc": (way.scores(weights) - rival.scores(weights)).mean(axis=0)}

    spread = Spread.of(statistic, folds.patient_ids)
    entry = spread.entry("auroc")
    low, high = (np.nan if entry[end] is None else float(entry[end]) for end in ("low", "high"))
    metric = f"{way.name} minus {rival.name}: mean test AUROC, 95 % over patients"
    patients = len(set(folds.patient_ids))
    return Result(_subject(folds), metric, "", float(spread.value["auroc"]), low, high, patients)


def _subject(folds: Folds) -> str:
    return f"{folds.name}, {len(folds.labels)} slides, {len(folds.parts)} folds"
