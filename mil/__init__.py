"""Multiple-instance learning on cached bags: cohorts, honest training and evaluation, prediction, reports.

Names are resolved on first use, so that ``import mil`` stays light.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "Board": "mil.benchmark",
    "Cohort": "mil.cohort",
    "MilError": "mil.errors",
    "Run": "mil.run",
    "TrainConfig": "mil.config",
    "benchmark": "mil.benchmark",
    "compose_config": "mil.config",
    "evaluate_external": "mil.external",
    "export_onnx": "mil.onnx_export",
    "open_store": "extract.store",
    "pack": "mil.packing",
    "predict": "mil.inference",
    "read_cohort": "mil.cohort",
    "train": "mil.crossval",
    "write_report": "mil.report",
}

__all__ = [
    "Board",
    "Cohort",
    "MilError",
    "Run",
    "TrainConfig",
    "benchmark",
    "compose_config",
    "evaluate_external",
    "export_onnx",
    "open_store",
    "pack",
    "predict",
    "read_cohort",
    "train",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mil' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
