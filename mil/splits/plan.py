"""A plan for splitting: which method, with which parameters; and the one function that carries it out."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mil.cohort.cohort import Cohort
from mil.errors import SplitError, did_you_mean
from mil.splits.folds import make_splits
from mil.splits.sites import leave_one_site_out, site_preserved_splits, tcga_site
from mil.splits.splits import Splits
from mil.splits.tables import read_column, read_split_column, read_split_file

TCGA = "tcga"
"""In the place of a column of sites: the tissue source site in the slide id's barcode."""


@dataclass(frozen=True)
class SplitPlan:
    """What to split by.

    Attributes:
        method: ``kfold`` (patient-grouped, stratified), ``site_preserved`` (every site in one fold only),
            ``leave_one_site_out`` (a fold per site) or ``fixed`` (`column` or `file` says).
        folds: number of folds per repeat; of ``kfold`` and ``site_preserved``.
        repeats: how often every slide is tested, with other folds each time; of the same two.
        split_seed: draws what the seeds of the replicas do not.
        seeds: those of the replicas; each has its own validation part, unless that is fixed.
        validation_fraction: of the slides outside the test part.
        sites: column of `table`, or ``tcga``; of the two methods by site.
        column: column of `table` with the words train, val and test; of ``fixed``.
        file: a `splits.csv`, the folder of a run, or CLAM's `splits_k.csv`, one or a folder of them; of ``fixed``.
        table: the label table.
        slide_column: its column of slide ids, when it is not called ``slide_id``.

    Example:
        >>> plan = SplitPlan("leave_one_site_out", sites="tcga")      # doctest: +SKIP
        >>> split_cohort(cohort, plan).record.parameters["sites"]     # doctest: +SKIP
        ['3X', 'AD']
    """

    method: Literal["kfold", "site_preserved", "leave_one_site_out", "fixed"] = "kfold"
    folds: int = 5
    repeats: int = 1
    split_seed: int = 0
    seeds: tuple[int, ...] = (0, 1, 2)
    validation_fraction: float = 0.2
    sites: str | None = None
    column: str | None = None
    file: Path | None = None
    table: Path | None = None
    slide_column: str | None = None

    def __post_init__(self) -> None:
        _check_method(self.method)
        _check_sources(self)
        if self.repeats > 1 and self.method in ("leave_one_site_out", "fixed"):
            raise SplitError(
                f"got repeats={self.repeats} with split={self.method} → expected repeats=1, because there is one way "
                f"to split so → remove repeats, or use split=kfold or split=site_preserved"
            )


def split_cohort(cohort: Cohort, plan: SplitPlan) -> Splits:
    """Split a cohort as a plan says; whatever the method, the parts are verified and the record says how it was done.

    Args:
        cohort: n slides, with the ids of the store.
        plan: what to split by.

    Raises:
        SplitError: no honest split is possible so, or a file or column does not hold one.
        CohortError: the table cannot be read, or lacks a column.
    """
    return _METHODS[plan.method](cohort, plan)


def _kfold(cohort: Cohort, plan: SplitPlan) -> Splits:
    return make_splits(cohort, plan.folds, repeats=plan.repeats, **_draws(plan))


def _site_preserved(cohort: Cohort, plan: SplitPlan) -> Splits:
    return site_preserved_splits(cohort, _sites(cohort, plan), plan.folds, repeats=plan.repeats, **_draws(plan))


def _leave_one_site_out(cohort: Cohort, plan: SplitPlan) -> Splits:
    return leave_one_site_out(cohort, _sites(cohort, plan), **_draws(plan))


def _fixed(cohort: Cohort, plan: SplitPlan) -> Splits:
    if plan.file is not None:
        return read_split_file(plan.file, cohort, **_draws(plan))
    return read_split_column(_table(plan), str(plan.column), cohort, plan.slide_column, **_draws(plan))


_METHODS: dict[str, Callable[[Cohort, SplitPlan], Splits]] = {
    "kfold": _kfold,
    "site_preserved": _site_preserved,
    "leave_one_site_out": _leave_one_site_out,
    "fixed": _fixed,
}


def _draws(plan: SplitPlan) -> dict[str, Any]:
    return {"split_seed": plan.split_seed, "seeds": plan.seeds, "validation_fraction": plan.validation_fraction}


def _sites(cohort: Cohort, plan: SplitPlan) -> tuple[str, ...]:
    """The site of every slide [n]."""
    if plan.sites == TCGA:
        return tuple(tcga_site(slide_id) for slide_id in cohort.slide_ids)
    return read_column(_table(plan), str(plan.sites), cohort, plan.slide_column)


def _table(plan: SplitPlan) -> Path:
    if plan.table is None:
        raise SplitError(
            f"got the column {plan.sites or plan.column!r} and no label table → expected the table that holds it → "
            f"name it with labels"
        )
    return plan.table


def _check_method(method: str) -> None:
    if method not in _METHODS:
        names = list(_METHODS)
        raise SplitError(
            f"got split={method} → expected one of {', '.join(names)} → {did_you_mean(method, names)}choose one"
        )


def _check_sources(plan: SplitPlan) -> None:
    """Each method gets the source that it needs, and no other."""
    by_site = plan.method in ("site_preserved", "leave_one_site_out")
    if by_site != (plan.sites is not None):
        raise SplitError(
            f"got split={plan.method} with sites={plan.sites} → expected a column of sites, or {TCGA}, for "
            f"site_preserved and leave_one_site_out, and for these only → "
            + (f"name the column with sites=, or sites={TCGA}" if by_site else "choose one of these, or remove sites")
        )
    n_sources = (plan.column is not None) + (plan.file is not None)
    if n_sources != (1 if plan.method == "fixed" else 0):
        raise SplitError(
            f"got split={plan.method} with split_column={plan.column} and split_file={plan.file} → expected exactly "
            f"one of them for split=fixed, and none otherwise → "
            + ("name one" if plan.method == "fixed" else "use split=fixed, or remove them")
        )
