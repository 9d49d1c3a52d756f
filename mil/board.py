"""A leaderboard: how heads and baselines did on one cohort, and which of them beat mean pooling."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mil import statistics
from mil.cohort import Cohort
from mil.comparison import holm, permutation_test
from mil.files import Row, write_csv
from mil.out_of_fold import read_out_of_fold

FloatArray = npt.NDArray[np.float64]
REFERENCE = "mean"
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval over patients; None where there is none."""

    value: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        point = "–" if self.value is None else f"{self.value:.3f}"
        return point if self.low is None else f"{point} [{self.low:.3f}, {self.high:.3f}]"


NOTHING = Interval(None, None, None)


@dataclass(frozen=True)
class Cost:
    """What a head takes; medians over its replicas.

    Attributes:
        parameters: numbers that a replica learns.
        training_bags: bags that a replica learns from.
        seconds: to train one replica.
        peak_bytes: most memory meanwhile, see `mil.usage.PeakMemory`.
        inference_ms: to predict one slide from its cached bag, the bags of all slides at once.
    """

    parameters: int
    training_bags: float
    seconds: float
    peak_bytes: float | None
    inference_ms: float


@dataclass(frozen=True, eq=False)
class Entrant:
    """What a head or baseline said of every slide, before it is compared.

    Attributes:
        name: the head with the keywords that were given.
        entry: the features that it read.
        kind: "head" or "baseline".
        probabilities: float64 [n, C], out of fold, mean over seeds; None if it failed.
        seed_scores: macro-F1 of the out-of-fold predictions of each seed alone.
        cost: None for a baseline.
        reason: why it failed.
        folder: its run folder.
    """

    name: str
    entry: str
    kind: str
    probabilities: FloatArray | None = None
    seed_scores: tuple[float, ...] = ()
    cost: Cost | None = None
    reason: str = ""
    folder: str = ""

    @classmethod
    def of_run(cls, name: str, entry: str, folder: Path, where: str) -> "Entrant":
        """A head that was trained, from its run folder, which lies at ``where`` in the board's."""
        found = read_out_of_fold(folder)
        replicas = found.metrics["per_replica"]
        return cls(
            name, entry, "head", found.probabilities, tuple(found.metrics["seed_macro_f1"]), _cost(replicas), "", where
        )


@dataclass(frozen=True)
class BoardRow:
    """One line of the board.

    Attributes:
        rank: by macro-F1, from 1; None if it failed.
        name: head or baseline.
        entry: features entry.
        kind: "head" or "baseline".
        macro_f1: of the out-of-fold predictions.
        balanced_accuracy: likewise.
        auroc: likewise.
        seed_low: lowest macro-F1 of one seed alone; None where there is one seed, which has no spread.
        seed_high: highest.
        difference: macro-F1 minus that of the head ``mean`` on the same features, paired over patients.
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
    macro_f1: Interval = NOTHING
    balanced_accuracy: Interval = NOTHING
    auroc: Interval = NOTHING
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

    def flat(self) -> dict[str, object]:
        """The row as columns of ``leaderboard.csv``."""
        plain: dict[str, object] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Interval):
                plain |= {item.name: value.value, f"{item.name}_low": value.low, f"{item.name}_high": value.high}
            elif item.name == "cost":
                plain |= _flat_cost(value)
            elif item.name != "warnings":
                plain[item.name] = value
        return plain


@dataclass(frozen=True, eq=False)
class Board:
    """A finished benchmark.

    Attributes:
        target: the label column.
        class_names: [C].
        n_slides: slides that every entrant was scored on.
        n_patients: their patients.
        rows: by rank, failures last.
        warnings: what a reader of the intervals must know.
        facts: settings and looks, for the page.
        synthetic: whether slides were drawn by `extract.synthetic`.
        folder: where it was written.

    Example:
        >>> board = benchmark(store, cohort, heads=["mean", "abmil"], out="board")      # doctest: +SKIP
        >>> print(board)                                                                # doctest: +SKIP
    """

    target: str
    class_names: tuple[str, ...]
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
        lines += [f"{row.rank or '–':>3}  {row.name:{width}}  {row.macro_f1}  {row.verdict}" for row in self.rows]
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


def score(entrant: Entrant, reference: Entrant | None, cohort: Cohort) -> BoardRow:
    """The row of an entrant, compared with mean pooling on the same features, before its place is known.

    Args:
        entrant: what to score.
        reference: the head ``mean`` on the same features, which may be the entrant itself.
        cohort: the slides.
    """
    row = BoardRow(
        None, entrant.name, entrant.entry, entrant.kind, cost=entrant.cost, reason=entrant.reason, folder=entrant.folder
    )
    if entrant.probabilities is None:
        return replace(row, verdict="failed")
    found = statistics.evaluate(cohort.labels, entrant.probabilities, cohort.patient_ids, cohort.class_names)
    row = replace(
        row,
        macro_f1=Interval(**found["macro_f1"]),
        balanced_accuracy=Interval(**found["balanced_accuracy"]),
        auroc=Interval(**found["auroc"]),
        warnings=tuple(found["warnings"]),
    )
    if len(entrant.seed_scores) > 1:
        row = replace(row, seed_low=min(entrant.seed_scores), seed_high=max(entrant.seed_scores))
    if reference is entrant:
        return replace(row, verdict="reference")
    if reference is None or reference.probabilities is None:
        return row
    both = (cohort.labels, entrant.probabilities, reference.probabilities, cohort.patient_ids)
    row = replace(row, difference=Interval(*statistics.paired_difference(*both)))
    return row if entrant.kind == "baseline" else replace(row, p=permutation_test(*both))


def rank(rows: Iterable[BoardRow]) -> tuple[BoardRow, ...]:
    """Sort by macro-F1, failures last, with p values corrected over all heads that were compared."""
    rows = _corrected(rows)
    scored = sorted((row for row in rows if row.macro_f1.value is not None), key=_order)
    failed = [row for row in rows if row.macro_f1.value is None]
    return (*(replace(row, rank=at) for at, row in enumerate(scored, 1)), *failed)


def _order(row: BoardRow) -> tuple[float, str, str]:
    return -(row.macro_f1.value or 0.0), row.name, row.entry


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
