"""Multiple-instance learning on cached bags: cohorts, honest training and evaluation, prediction, reports.

Names are resolved on first use, so that ``import mil`` stays light.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "Cohort": "mil.cohort",
    "MilError": "mil.errors",
    "Run": "mil.crossval",
    "TrainConfig": "mil.config",
    "compose_config": "mil.config",
    "open_store": "extract.store",
    "predict": "mil.inference",
    "read_cohort": "mil.cohort",
    "train": "mil.crossval",
    "write_report": "mil.report",
}

__all__ = [
    "Cohort",
    "MilError",
    "Run",
    "TrainConfig",
    "compose_config",
    "open_store",
    "predict",
    "read_cohort",
    "train",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mil' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
