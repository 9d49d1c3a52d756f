"""A leaderboard: how heads and baselines did on one cohort, and which of them beat mean pooling."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from mil.cohort.cohort import Cohort
from mil.evaluation.headlines import first_headline, ranking_metrics
from mil.evaluation.outcomes import Outcomes
from mil.evaluation.paired import NOTHING, SIGNIFICANT, Interval, Pair
from mil.files import Row, write_csv
from mil.runs.run_folder import RunFolder
from mil.runs.saved_outcomes import read_outcomes
from mil.statistics.paired_tests import holm

REFERENCE = "mean"


@dataclass(frozen=True)
class Cost:
    """What a head takes; medians over its replicas.

    Attributes:
        parameters: numbers that a replica learns.
        training_bags: bags that a replica learns from.
        seconds: to train one replica.
        peak_bytes: most memory meanwhile, see `mil.bags.devices.PeakMemory`.
        inference_ms: to predict one slide from its cached bag, the bags of all slides at once.
    """

    parameters: int
    training_bags: float
    seconds: float
    peak_bytes: float | None
    inference_ms: float


@dataclass(frozen=True, eq=False)
class Entrant:
    """What a head or baseline predicts of every slide, before it is compared.

    Attributes:
        name: the head with the keywords that were given.
        entry: the features that it read.
        kind: "head" or "baseline".
        outcomes: out of fold, mean over seeds; None if it failed.
        seed_scores: the task's first headline, of the out-of-fold predictions of each seed alone.
        cost: None for a baseline.
        reason: why it failed.
        folder: its run folder.
    """

    name: str
    entry: str
    kind: str
    outcomes: Outcomes | None = None
    seed_scores: tuple[float, ...] = ()
    cost: Cost | None = None
    reason: str = ""
    folder: str = ""

    @classmethod
    def of_run(cls, name: str, entry: str, folder: Path, where: str) -> "Entrant":
        """A head that was trained, from its run folder, which lies at ``where`` in the board's."""
        run = RunFolder.open(folder, "per_replica")
        seeds = run.metrics.get("seed_macro_f1") or run.predictions().seed_scores(first_headline(run.task))
        cost = _cost(run.metrics["per_replica"])
        return cls(name, entry, "head", read_outcomes(run), tuple(seeds), cost, "", where)


@dataclass(frozen=True)
class BoardRow:
    """One line of the board.

    Attributes:
        rank: by the first headline of the task, from 1; None if it failed.
        name: head or baseline.
        entry: features entry.
        kind: "head" or "baseline".
        scores: metrics of the out-of-fold predictions, see `board_metrics`; the first ranks the board.
        seed_low: lowest first metric of one seed alone; None where there is one seed, which has no spread.
        seed_high: highest.
        difference: the first metric minus that of the head ``mean`` on the same features, paired over patients.
        p: of that difference, by exchanging predictions patient by patient; None for baselines.
        p_holm: corrected for the number of heads on the board.
        verdict: "reference", "beats mean pooling", "does not beat mean pooling", "failed", or "" where none is due.
        cost: see `Cost`.
        reason: why it failed.
        folder: its run folder, relative to the board's.
        warnings: what a reader of the intervals must know.
    """

    rank: int | None
    name: str
    entry: str
    kind: str
    scores: Mapping[str, Interval] = field(default_factory=dict)
    seed_low: float | None = None
    seed_high: float | None = None
    difference: Interval = NOTHING
    p: float | None = None
    p_holm: float | None = None
    verdict: str = ""
    cost: Cost | None = None
    reason: str = ""
    folder: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def headline(self) -> Interval:
        """What it is ranked by."""
        return next(iter(self.scores.values()), NOTHING)

    def flat(self) -> dict[str, object]:
        """The row as columns of ``leaderboard.csv``."""
        plain: dict[str, object] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Interval):
                plain |= value.flat(item.name)
            elif item.name == "scores":
                for name, interval in value.items():
                    plain |= interval.flat(name)
            elif item.name == "cost":
                plain |= _flat_cost(value)
            elif item.name != "warnings":
                plain[item.name] = value
        return plain


@dataclass(frozen=True, eq=False)
class Board:
    """A finished benchmark.

    Attributes:
        target: the label column, or columns.
        task: one of `mil.cohort.targets.TASKS`.
        class_names: [C]; of other targets than classes none.
        metrics: of every row's `scores`, the one that ranks the board first.
        n_slides: slides that every entrant was scored on.
        n_patients: their patients.
        rows: by rank, failures last.
        warnings: what a reader of the intervals must know.
        facts: settings and looks, for the page.
        synthetic: whether slides were drawn by `extract.synthetic.cohort`.
        folder: where it was written.

    Example:
        >>> board = benchmark(store, cohort, heads=["mean", "abmil"], out="board")      # doctest: +SKIP
        >>> print(board)                                                                # doctest: +SKIP
    """

    target: str
    task: str
    class_names: tuple[str, ...]
    metrics: tuple[str, ...]
    n_slides: int
    n_patients: int
    rows: tuple[BoardRow, ...]
    warnings: tuple[str, ...]
    facts: dict[str, Any]
    synthetic: bool
    folder: Path | None = None

    def __str__(self) -> str:
        lines = [f"{self.target}: {self.n_slides} slides of {self.n_patients} patients"]
        width = max(len(row.name) for row in self.rows)
        lines += [f"{row.rank or '–':>3}  {row.name:{width}}  {row.headline}  {row.verdict}" for row in self.rows]
        return "\n".join(lines)

    def table(self) -> list[dict[str, object]]:
        """The columns of ``leaderboard.csv``, one mapping a row."""
        return [row.flat() for row in self.rows]

    def write_csv(self, path: Path) -> None:
        """Write ``leaderboard.csv``, atomically."""
        write_csv(path, self._csv_rows())

    def _csv_rows(self) -> Iterator[Row]:
        table = self.table()
        yield tuple(table[0])
        for row in table:
            yield tuple("" if value is None else _rounded(value) for value in row.values())


def board_metrics(cohort: Cohort) -> tuple[str, ...]:
    """The headlines that a board has columns for; errors of several numbers have no common mean."""
    return ranking_metrics(cohort.task, len(cohort.columns))


def score(entrant: Entrant, reference: Entrant | None, cohort: Cohort) -> BoardRow:
    """The row of an entrant, compared with mean pooling on the same features, before its place is known.

    Args:
        entrant: what to score.
        reference: the head ``mean`` on the same features, which may be the entrant itself.
        cohort: the slides.
    """
    metrics = board_metrics(cohort)
    row = BoardRow(
        None,
        entrant.name,
        entrant.entry,
        entrant.kind,
        dict.fromkeys(metrics, NOTHING),
        cost=entrant.cost,
        reason=entrant.reason,
        folder=entrant.folder,
    )
    if entrant.outcomes is None:
        return replace(row, verdict="failed")
    found = entrant.outcomes.evaluate()
    scores = {name: Interval(**found[name]) for name in metrics}
    row = replace(row, scores=scores, warnings=tuple(found["warnings"]))
    if len(entrant.seed_scores) > 1:
        row = replace(row, seed_low=min(entrant.seed_scores), seed_high=max(entrant.seed_scores))
    if reference is entrant:
        return replace(row, verdict="reference")
    if reference is None or reference.outcomes is None:
        return row
    pair = Pair(entrant.outcomes, reference.outcomes, metrics[0])
    row = replace(row, difference=Interval.of(pair.difference()))
    return row if entrant.kind == "baseline" else replace(row, p=pair.p())


def rank(rows: Iterable[BoardRow]) -> tuple[BoardRow, ...]:
    """Sort by the first metric, failures last, with p values corrected over all heads that were compared."""
    rows = _corrected(rows)
    scored = sorted((row for row in rows if row.headline.value is not None), key=_order)
    failed = [row for row in rows if row.headline.value is None]
    return (*(replace(row, rank=at) for at, row in enumerate(scored, 1)), *failed)


def _order(row: BoardRow) -> tuple[float, str, str]:
    return -(row.headline.value or 0.0), row.name, row.entry


def _corrected(rows: Iterable[BoardRow]) -> list[BoardRow]:
    """Holm's correction over the heads that were compared, and what follows from it."""
    rows = list(rows)
    compared = [at for at, row in enumerate(rows) if row.p is not None]
    for at, adjusted in zip(compared, holm([rows[at].p or 0.0 for at in compared]), strict=True):
        better = (rows[at].difference.low or 0.0) > 0 and adjusted < SIGNIFICANT
        verdict = "beats mean pooling" if better else "does not beat mean pooling"
        rows[at] = replace(rows[at], p_holm=adjusted, verdict=verdict)
    return rows


def _cost(replicas: Sequence[dict[str, Any]]) -> Cost:
    """Medians over replicas, as ``metrics.json`` lists them."""

    def median(key: str) -> float:
        return float(np.median([each[key] for each in replicas]))

    peak = None if replicas[0]["peak_bytes"] is None else median("peak_bytes")
    return Cost(
        replicas[0]["parameters"], median("training_bags"), median("seconds"), peak, median("inference_ms_per_slide")
    )


def _flat_cost(cost: Cost | None) -> dict[str, object]:
    names = ("parameters", "training_bags", "parameters_per_bag", "seconds_per_replica", "peak_mb", "inference_ms")
    if cost is None:
        return dict.fromkeys(names)
    peak = None if cost.peak_bytes is None else cost.peak_bytes / 1e6
    ratio = cost.parameters / cost.training_bags
    values = (cost.parameters, cost.training_bags, ratio, cost.seconds, peak, cost.inference_ms)
    return dict(zip(names, values, strict=True))


def _rounded(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value
