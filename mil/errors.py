"""What can go wrong in `mil`, in one tree.

    MilError
    ├── CohortError           (ValueError)       a label table that cannot be used as it is
    ├── SplitError            (ValueError)       no honest split exists for this cohort, or a split file is not one
    ├── EvaluationError       (ValueError)       labels and predictions that cannot be scored
    ├── ConfigError           (ValueError)       an option that does not exist or has an impossible value
    ├── BagError              (ValueError)       cached features that cannot be read as bags
    ├── RunError              (ValueError)       a run folder that is incomplete or in the way
    ├── CheckpointError       (ValueError)       a checkpoint that does not fit its head or its features
    ├── TrainingDivergedError (ArithmeticError)  a loss that is no longer finite
    └── MissingExtraError     (ImportError)      an optional package that is not installed

Every message reads `got ... → expected ... → do this`.
"""

import difflib
from collections.abc import Iterable, Sequence


class MilError(Exception):
    """Base of every error that `mil` raises on purpose."""


class CohortError(MilError, ValueError):
    """A label table is missing, unreadable, contradicts itself or does not fit the store."""


class SplitError(MilError, ValueError):
    """No split keeps every class in every training part, or a split file does not fit the cohort."""


class EvaluationError(MilError, ValueError):
    """Labels, probabilities and patients cannot be scored together."""


class ConfigError(MilError, ValueError):
    """An option is unknown or its value is impossible."""


class BagError(MilError, ValueError):
    """Cached features cannot be read as bags."""


class RunError(MilError, ValueError):
    """A run folder is incomplete, or in the way of a new run."""


class CheckpointError(MilError, ValueError):
    """A checkpoint does not fit its head or the features it is applied to."""


class TrainingDivergedError(MilError, ArithmeticError):
    """The loss is no longer finite."""


class MissingExtraError(MilError, ImportError):
    """An optional package is needed and not installed."""


def listed(names: Iterable[object], limit: int = 8) -> str:
    """Names for a message, the first `limit` of them.

    >>> listed(["a", "b", "c"], limit=2)
    "'a', 'b' and 1 more"
    """
    texts = [repr(name) if isinstance(name, str) else str(name) for name in names]
    shown = ", ".join(texts[:limit])
    return shown if len(texts) <= limit else f"{shown} and {len(texts) - limit} more"


def did_you_mean(got: str, valid: Sequence[str], prefix: str = "") -> str:
    """Near matches of a mistyped name as `did you mean 'x'? `, or an empty string; ``prefix`` stands before each.

    >>> did_you_mean("subtyp", ["subtype", "grade"])
    "did you mean 'subtype'? "
    """
    by_lower = {name.lower(): name for name in valid}
    near = difflib.get_close_matches(got.lower(), list(by_lower), n=3, cutoff=0.6)
    return f"did you mean {' or '.join(repr(prefix + by_lower[name]) for name in near)}? " if near else ""


def nearest(got: str, valid: Sequence[str]) -> list[str]:
    """All valid names, those that are most like a mistyped one first.

    >>> nearest("fold", ["seeds", "folds"])
    ['folds', 'seeds']
    """
    matcher = difflib.SequenceMatcher(b=got.lower())

    def likeness(name: str) -> float:
        matcher.set_seq1(name.lower())
        return matcher.ratio()

    return sorted(valid, key=likeness, reverse=True)
