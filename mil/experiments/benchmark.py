"""Benchmarking heads: heads and features, folds and seeds on one cohort, in one go that may be stopped and resumed.

Every cell of the board is a training by `mil.experiments.crossval`, under the same settings, on the same slides and
folds, and saved as a run folder of its own; baselines are added. A head that fails costs its row, not the board.
"""

import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import yaml  # type: ignore[import-untyped]

from aggregators import list_aggregators
from aggregators.errors import AggregatorError
from extract.store import Store, open_store
from extract.store.core.remote_path import store_path
from mil.bags.bags import VIEW, Bags, choose_entry, needs_coords, open_bags, place_bags
from mil.bags.forward import resolve_device
from mil.cohort.cohort import Cohort, join_store, read_cohort
from mil.config.preflight import missing_inputs
from mil.config.train import HeadConfig, TrainConfig, compose_config, read_config_file, take_overrides
from mil.errors import ConfigError, MilError, MissingExtraError, RunError, listed
from mil.experiments.baselines import ON_FEATURES, run_baselines
from mil.experiments.crossval import check_target, cross_validate, is_synthetic, split_plan
from mil.experiments.leaderboard import REFERENCE, Board, BoardRow, Entrant, board_metrics, rank, score
from mil.experiments.leaderboard_page import write_page
from mil.files import write_atomically
from mil.runs.folders import check_board_folder
from mil.runs.look_ledger import Look
from mil.runs.run import check_folder
from mil.splits.plan import split_cohort
from mil.splits.splits import Splits, write_splits
from mil.training.replicas import OnProgress
from mil.training.resume import UNESSENTIAL, discard_unfinished, training_key

DEFAULT_HEADS = ("mean", "max", "abmil", "transformer")


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to benchmark.

    Attributes:
        stores: embedding stores with the cohort's slides.
        heads: names, or mappings of ``name`` and keywords. The head ``mean`` is always among them.
        backbones: features entries to read; None takes all that the stores hold.
        train: how every head is trained; its own head, store and backbone are not read.
    """

    stores: tuple[Path, ...]
    heads: tuple[HeadConfig, ...]
    backbones: tuple[str, ...] | None
    train: TrainConfig

    def to_yaml(self) -> str:
        """The text of the board's ``config.yaml``."""
        plain = self.train.to_dict()
        for name in ("head", "store", "backbone"):
            plain.pop(name)
        heads = [{"name": head.name} | given_keywords(head) for head in self.heads]
        chosen = {"stores": [str(path) for path in self.stores], "heads": heads}
        chosen["backbones"] = None if self.backbones is None else list(self.backbones)
        text: str = yaml.safe_dump(chosen | plain, sort_keys=False, allow_unicode=True)
        return text


def compose_benchmark(
    overrides: Sequence[str] = (), file: str | Path | None = None, values: Mapping[str, Any] | None = None
) -> BenchmarkConfig:
    """Compose a benchmark's settings: those of `compose_config`, and ``heads``, ``backbones`` and ``stores``.

    Raises:
        ConfigError: an unknown key, head, keyword or value.
    """
    given = read_config_file(Path(file)) if file is not None else {}
    own, others = take_overrides(overrides, ("heads", "backbones", "stores"))
    values = dict(values or {})
    chosen: dict[str, Any] = {}
    for name in ("heads", "backbones", "stores"):
        chosen[name] = given.pop(name, None)
        chosen[name] = own.get(name, chosen[name])
        chosen[name] = values.pop(name, chosen[name]) or chosen[name]
    misplaced = [text for text in others if re.match(r"(head|store|backbone)\b", text)]
    if misplaced:
        raise ConfigError(
            f"got {misplaced[0]} → a benchmark takes heads=[...], backbones=[...] and --store → give a head's keywords "
            f"as heads=[mean,'{{name: abmil, dropout: 0.5}}']"
        )
    train = compose_config(others, given, values)
    if train.track:
        raise ConfigError(
            f"got track={list(train.track)} → a benchmark tells no trackers → leave it out; mil train has it"
        )
    return BenchmarkConfig(
        stores=tuple(store_path(path).expanduser().absolute() for path in chosen["stores"] or ()),
        heads=_heads(chosen["heads"]),
        backbones=tuple(_list("backbones", chosen["backbones"])) if chosen["backbones"] is not None else None,
        train=train,
    )


def given_keywords(head: HeadConfig) -> dict[str, Any]:
    """The keywords of a head that are not its defaults."""
    defaults = HeadConfig(head.name).keywords
    return {key: value for key, value in head.keywords.items() if value != defaults[key]}


def head_title(head: HeadConfig) -> str:
    """Such as ``abmil gated=False``."""
    return " ".join([head.name, *(f"{key}={value}" for key, value in given_keywords(head).items())])


def _list(name: str, value: Any) -> list[Any]:
    if isinstance(value, str | Mapping):
        return [value]
    if not isinstance(value, Sequence) or not value:
        raise ConfigError(f"got {name}={value!r} → expected a list → write {name}=[...]")
    return list(value)


def _heads(given: Any) -> tuple[HeadConfig, ...]:
    """The heads asked for; mean pooling first, since all are compared with it."""
    wanted = list_aggregators() if given == "all" else _list("heads", given) if given is not None else DEFAULT_HEADS
    heads = [HeadConfig(REFERENCE)]
    for each in wanted:
        if isinstance(each, Mapping) and "name" not in each:
            raise ConfigError(
                f"got the head {dict(each)} → expected a name among its keys → write '{{name: abmil, ...}}'"
            )
        keywords = dict(each) if isinstance(each, Mapping) else {"name": str(each)}
        head = HeadConfig(str(keywords.pop("name")), keywords)
        if head not in heads:
            heads.append(head)
        elif head != heads[0]:
            raise ConfigError(f"got the head {head_title(head)} twice in heads → expected each once → take one out")
    return tuple(heads)


@dataclass(frozen=True)
class BenchmarkProgress:
    """Where a benchmark is: ``done`` of ``total`` replicas, working on ``what``."""

    done: int
    total: int
    what: str


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
    cohort = read_cohort(train.labels, train.target, train.slide_column, train.patient_column, task=train.task)
    stores = [open_store(path) for path in config.stores]
    return _benchmark(stores, cohort, config, Path(out).absolute(), progress, overwrite)


# ------------------------------------------------------------------------------------------------------------ the cells


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
    write_atomically(folder / "config.yaml", config.to_yaml().encode())
    write_splits(folder / "splits.csv", splits, cohort)
    replicas = splits.n_folds * len(train.seeds)
    count = _Count(len(sources) * len(config.heads) * replicas, progress or (lambda _: None))
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
            board = _board(rows, cohort, tested, config, sources, splits.warnings, folder)
            # after each cell, so that a long benchmark can be followed
            board.write_csv(folder / "leaderboard.csv")
            with suppress(MissingExtraError):
                write_page(folder / "leaderboard.html", board)
    with suppress(OSError):
        # gone unless a cell that failed has left replicas there
        (folder / "unfinished").rmdir()
    return board


@dataclass(frozen=True, eq=False)
class _Cell:
    """One head on one source."""

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
    try:
        found = json.loads((run_folder / "metrics.json").read_text(encoding="utf-8"))["key"]
    except (OSError, ValueError, KeyError):
        return False
    splits = split_cohort(cohort, split_plan(train))
    return bool(found == training_key(train, cohort, splits, bags, resolve_device(train.device)))


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
        class_names=cohort.class_names if cohort.values is None else (),
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
