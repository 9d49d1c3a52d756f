"""Benchmarking heads: heads and features, folds and seeds on one cohort, in one go that may be stopped and resumed.

Every cell of the board is a training by `mil.experiments.crossval`, under the same settings, on the same slides and
folds, and saved as a run folder of its own; baselines are added. A head that fails costs its row, not the board.
"""

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from aggregators.errors import AggregatorError
from extract.store import Store, open_store
from mil.bags.bags import Bags, place_bags
from mil.bags.devices import resolve_device
from mil.bags.stored import VIEW, choose_entry, is_synthetic, needs_coords, open_bags
from mil.cohort.cohort import Cohort
from mil.cohort.joining import join_store
from mil.config.preflight import missing_inputs, read_labels
from mil.config.sections import HeadConfig
from mil.config.train import TrainConfig
from mil.errors import ConfigError, MilError, MissingExtraError, RunError, listed
from mil.experiments.baselines import ON_FEATURES, run_baselines
from mil.experiments.benchmark_config import DEFAULT_HEADS, BenchmarkConfig, compose_benchmark, head_title
from mil.experiments.cost import HeadCost, cheapest_first, measure_costs
from mil.experiments.crossval import check_target, cross_validate, split_plan
from mil.experiments.leaderboard import Board, BoardRow, Entrant, board_metrics, rank, score
from mil.experiments.leaderboard_page import write_page
from mil.files import tell_full_disk, write_atomically
from mil.runs.folders import check_board_folder
from mil.runs.look_ledger import Look
from mil.runs.run import check_folder
from mil.runs.run_folder import RunFolder
from mil.splits.plan import split_cohort
from mil.splits.splits import Splits
from mil.splits.tables import write_splits
from mil.training.replicas import OnProgress
from mil.training.resume import UNESSENTIAL, discard_unfinished, training_key


@dataclass(frozen=True)
class BenchmarkProgress:
    """Where a benchmark is: ``done`` of ``total`` replicas, working on ``what``.

    Before the first of them ``costs`` says what each head will cost, in the order in which they are trained.
    """

    done: int
    total: int
    what: str
    costs: tuple[HeadCost, ...] = ()


@dataclass(frozen=True, eq=False)
class _Source:
    """Features that heads read."""

    store: Store
    entry: str
    name: str
    bags: Bags


@dataclass
class _Count:
    """Counts the replicas of all cells in one line."""

    total: int
    report: Callable[[BenchmarkProgress], None]
    done: int = 0
    inside: int = 0

    def cell(self, what: str) -> OnProgress:
        """The progress of one training."""
        self.inside = 0

        def step(progress: Any) -> None:
            if progress.trained is not None:
                self.inside += 1
            note = what
            if progress.record is not None:
                note = f"{what}, {progress.replica.name} epoch {progress.record.epoch}"
            self.report(BenchmarkProgress(self.done + self.inside, self.total, note))

        return step

    def finish(self, replicas: int, what: str) -> None:
        """A cell is over, however it ended."""
        self.done += replicas
        self.report(BenchmarkProgress(self.done, self.total, what))


def benchmark(
    store: Store | Sequence[Store],
    cohort: Cohort,
    heads: Sequence[str | Mapping[str, Any]] | str = DEFAULT_HEADS,
    out: str | Path | None = None,
    backbones: Sequence[str] | None = None,
    progress: Callable[[BenchmarkProgress], None] | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Board:
    """Train and compare heads on the same slides, folds and seeds; always beside mean pooling and the task's baselines.

    Args:
        store: one store or several; every features entry of each is a column of the comparison.
        cohort: slides, patients and labels; slides that one of the stores lacks are left out and listed.
        heads: names, or mappings of ``name`` and keywords, or "all".
        out: folder of the board; a benchmark that was stopped goes on from what it holds. None keeps nothing.
        backbones: features entries; None takes all.
        progress: called as replicas and epochs are done.
        overwrite: replace a board that was made under other settings.
        **options: any other field of `TrainConfig`: ``folds=5, seeds=3, epochs=20``.

    Raises:
        ConfigError: an unknown head, keyword or option.
        CohortError, SplitError, BagError: as in `mil.train`. A head that fails is a row of the board instead.
        RunError: ``out`` holds something else than a board.
    """
    stores = [store] if not isinstance(store, Sequence) else list(store)
    values = {"target": cohort.target, "task": cohort.task, "heads": heads, "backbones": backbones} | options
    config = compose_benchmark(values=values | {"stores": [each.path for each in stores]})
    if out is not None:
        return _benchmark(stores, cohort, config, Path(out).absolute(), progress, overwrite)
    with tempfile.TemporaryDirectory() as folder:
        return replace(_benchmark(stores, cohort, config, Path(folder), progress, overwrite), folder=None)


def run_benchmark(
    config: BenchmarkConfig,
    out: str | Path,
    progress: Callable[[BenchmarkProgress], None] | None = None,
    overwrite: bool = False,
) -> Board:
    """Benchmark as a configuration says, into the folder ``out``.

    Raises:
        ConfigError: store, labels or target is not given.
        MilError, ExtractError: as in `benchmark`.
    """
    train = config.train
    if not config.stores or train.labels is None or train.target is None:
        raise missing_inputs({**vars(train), "store": config.stores}, "a benchmark")
    cohort = read_labels(train)
    stores = [open_store(path) for path in config.stores]
    return _benchmark(stores, cohort, config, Path(out).absolute(), progress, overwrite)


def _benchmark(
    stores: Sequence[Store],
    cohort: Cohort,
    config: BenchmarkConfig,
    folder: Path,
    progress: Callable[[BenchmarkProgress], None] | None,
    overwrite: bool,
) -> Board:
    check_target(config.train, cohort)
    _prepare(folder, config, overwrite)
    cohort, sources = _sources(stores, cohort, config)
    cells = [[_Cell.of(source, head, config.train, folder) for head in config.heads] for source in sources]
    train = config.train
    splits = split_cohort(cohort, split_plan(train))
    tested = cohort.subset(np.flatnonzero(splits.test.any(axis=0)))
    with tell_full_disk(folder):
        write_atomically(folder / "config.yaml", config.to_yaml().encode())
        write_splits(folder / "splits.csv", splits, cohort)
    replicas = splits.n_folds * len(train.seeds)
    count = _Count(len(sources) * len(config.heads) * replicas, progress or (lambda _: None))
    if progress is not None:
        costs = measure_costs(cells, cohort, replicas, lambda what: progress(BenchmarkProgress(0, count.total, what)))
        cells = [cheapest_first(its_cells, costs) for its_cells in cells]
        told = tuple(costs[cell] for its_cells in cells for cell in its_cells)
        progress(BenchmarkProgress(0, count.total, "training", told))
    rows: list[BoardRow] = []
    for source, its_cells in zip(sources, cells, strict=True):
        reference: Entrant | None = None
        for cell in its_cells:
            entrants = [_enter(cell, cohort, count)]
            if reference is None:
                # mean pooling is the first of the heads, and the baselines are compared with it too
                reference = entrants[0]
                entrants += _baselines(source, cohort, splits, rows)
            rows += [score(each, reference, tested) for each in entrants]
            count.finish(replicas, cell.where)
            board = _board(_in_order(rows, sources, config), cohort, tested, config, sources, splits.warnings, folder)
            # after each cell, so that a long benchmark can be followed
            with tell_full_disk(folder), suppress(MissingExtraError):
                board.write_csv(folder / "leaderboard.csv")
                write_page(folder / "leaderboard.html", board)
    with suppress(OSError):
        # gone unless a cell that failed has left replicas there
        (folder / "unfinished").rmdir()
    return board


@dataclass(frozen=True, eq=False)
class _Cell:
    """One head on one source; equal to itself alone."""

    source: _Source
    title: str
    name: str
    train: TrainConfig
    run_folder: Path
    unfinished: Path

    @classmethod
    def of(cls, source: _Source, head: HeadConfig, train: TrainConfig, folder: Path) -> "_Cell":
        """Made for all cells before the first is trained, so that impossible settings are told at once.

        Raises:
            ConfigError: the head and the other settings do not go together.
            RunError: its run folder holds something else.
        """
        title = head_title(head)
        name = f"{_slug(title)}--{_slug(source.name)}"
        own = replace(train, head=head, store=source.store.path, backbone=source.entry)
        check_folder(folder / "runs" / name, overwrite=True)
        return cls(source, title, name, own, folder / "runs" / name, folder / "unfinished" / name)

    @property
    def where(self) -> str:
        """For progress."""
        return f"{self.title} on {self.source.name}"


def _in_order(rows: Sequence[BoardRow], sources: Sequence[_Source], config: BenchmarkConfig) -> list[BoardRow]:
    """The rows in the order of the settings, in whichever they were made."""
    titles = [head_title(head) for head in config.heads]
    names = [source.name for source in sources]

    def place(row: BoardRow) -> tuple[int, int]:
        # baselines stand behind mean pooling, the first of the heads
        at = titles.index(row.name) if row.name in titles else 0
        return names.index(row.entry) if row.entry in names else 0, 2 * at + (row.name not in titles)

    return sorted(rows, key=place)


def _baselines(source: _Source, cohort: Cohort, splits: Splits, rows: Sequence[BoardRow]) -> list[Entrant]:
    """The baselines on one source; guessing is the same on any and comes once."""
    there = {row.name for row in rows if not row.name.startswith(ON_FEATURES)}
    found = run_baselines(source.bags, cohort, splits)
    return [Entrant(each.name, source.name, "baseline", each.outcomes) for each in found if each.name not in there]


def _prepare(folder: Path, config: BenchmarkConfig, overwrite: bool) -> None:
    """Refuse a folder that holds anything but a board of these settings, which is gone on with."""
    check_board_folder(folder)
    if (folder / "config.yaml").is_file() and not overwrite:
        _refuse_other_settings(folder, config)
    folder.mkdir(parents=True, exist_ok=True)


def _refuse_other_settings(folder: Path, config: BenchmarkConfig) -> None:
    """Heads and features may be added to a board; under other settings its rows would no longer be comparable."""
    try:
        earlier = compose_benchmark(file=folder / "config.yaml").train.to_dict()
    except MilError as error:
        raise RunError(
            f"got {folder} as folder of a board → its config.yaml is not that of a board ({error}) → give another "
            f"folder with --out"
        ) from error
    current = config.train.to_dict()
    differing = [name for name in current if name not in UNESSENTIAL and current[name] != earlier.get(name)]
    if differing:
        changes = ", ".join(f"{name} {earlier.get(name)} → {current[name]}" for name in differing)
        raise RunError(
            f"got other settings than those of the board in {folder} ({changes}) → expected the same for all of its "
            f"rows → give another folder with --out, or add --overwrite to train everything again"
        )


def _sources(stores: Sequence[Store], cohort: Cohort, config: BenchmarkConfig) -> tuple[Cohort, list[_Source]]:
    """The features to read, and the slides that all of them hold."""
    found = []
    for store in stores:
        entries = store.entries()
        # views are trained on with their entry
        wanted = (
            [name for name in entries if VIEW not in name]
            if config.backbones is None
            else [name for name in config.backbones if name in entries]
        )
        found += [(store, choose_entry(store, entry)) for entry in wanted]
    unknown = sorted(set(config.backbones or ()) - {entry for _, entry in found})
    if unknown or not found:
        there = sorted({entry for store in stores for entry in store.entries()})
        raise ConfigError(
            f"got backbones={listed(unknown)} → the stores hold {listed(there) or 'no features'} → name some of these, "
            f"or run mil extract"
        )
    common = set(found[0][0].slide_ids(found[0][1]))
    for store, entry in found[1:]:
        common &= set(store.slide_ids(entry))
    cohort = join_store(cohort, sorted(common))
    names = _names(found)
    sources = []
    for (store, entry), name in zip(found, names, strict=True):
        positions = any(needs_coords(head.keywords) for head in config.heads)
        views = config.train.views == "sample"
        bags = open_bags(store, cohort.slide_ids, entry, config.train.memory, positions, views)
        # features that are not finite stop the benchmark here, before any head is blamed
        _ = bags.moments
        if config.train.memory == "auto":
            bags = place_bags(bags, resolve_device(config.train.device))
        sources.append(_Source(store, entry, name, bags))
    return cohort, sources


def _names(found: Sequence[tuple[Store, str]]) -> list[str]:
    """A name for every source: its entry, with as much of its store as tells it from the others.

    Raises:
        ConfigError: the same features twice.
    """
    kinds = (
        [entry for _, entry in found],
        [f"{entry} ({store.path.name})" for store, entry in found],
        [f"{entry} ({store.path})" for store, entry in found],
    )
    for names in kinds:
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"got the features {listed(kinds[-1])} → expected each once → take one out")


def _enter(cell: _Cell, cohort: Cohort, count: _Count) -> Entrant:
    """Train one cell, unless an earlier benchmark has; the row is made from its run folder either way."""
    source = cell.source
    try:
        if not _is_trained(cell.run_folder, cell.train, cohort, source.bags):
            progress = count.cell(cell.where)
            run = cross_validate(source.store, cohort, cell.train, progress, cell.unfinished, source.bags)
            run.save(cell.run_folder, overwrite=True)
            discard_unfinished(cell.unfinished)
        return Entrant.of_run(cell.title, source.name, cell.run_folder, f"runs/{cell.name}")
    except (MilError, AggregatorError, MemoryError, RuntimeError) as error:
        return Entrant(cell.title, source.name, "head", reason=str(error).partition("\n")[0] or type(error).__name__)


def _is_trained(run_folder: Path, train: TrainConfig, cohort: Cohort, bags: Bags) -> bool:
    """Whether a run folder holds the result of exactly this training."""
    run = RunFolder.find(run_folder)
    if run is None or "key" not in run.metrics:
        return False
    splits = split_cohort(cohort, split_plan(train))
    return bool(run.metrics["key"] == training_key(train, cohort, splits, bags, resolve_device(train.device)))


def _board(
    rows: Sequence[BoardRow],
    cohort: Cohort,
    tested: Cohort,
    config: BenchmarkConfig,
    sources: Sequence[_Source],
    warnings: Sequence[str],
    folder: Path,
) -> Board:
    train = config.train
    mind = dict.fromkeys([*warnings, *(text for row in rows for text in row.warnings)])
    facts = {
        "split": train.split
        if train.split != "kfold"
        else f"{train.folds} folds" + f", {train.repeats} times" * (train.repeats > 1),
        "seeds": len(train.seeds),
        "epochs": f"at most {train.epochs}",
        "optimizer": f"{train.optimizer.name}, learning rate {train.optimizer.lr:g}",
        "features": ", ".join(source.name for source in sources),
        "device": train.device,
        "looks at the test folds": Look.at(folder / "runs" / "-", cohort, "", "").count_earlier(),
    }
    return Board(
        target=cohort.target,
        task=cohort.task,
        class_names=cohort.stated_classes,
        metrics=board_metrics(cohort),
        n_slides=len(tested),
        n_patients=len(set(tested.patient_ids)),
        rows=rank(rows),
        warnings=tuple(mind),
        facts=facts,
        synthetic=any(is_synthetic(source.store, cohort.slide_ids) for source in sources),
        folder=folder,
    )


def _slug(text: str) -> str:
    """A title as part of a folder's name: never empty, never a path, and different for different titles."""
    plain = re.sub(r"[^A-Za-z0-9._=-]+", "-", text).strip(".-")[:80]
    return plain if plain == text else f"{plain}-{sha256(text.encode()).hexdigest()[:6]}"
