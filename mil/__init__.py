"""Multiple-instance learning on cached bags: cohorts, honest training and evaluation, prediction, reports.

Names are resolved on first use, so that ``import mil`` stays light.
"""

from importlib import import_module
from typing import Any

# no name is that of a module of mil: importing the module would put it in the name's place
_HOME = {
    "Board": "mil.board",
    "Cohort": "mil.cohort",
    "MilError": "mil.errors",
    "Run": "mil.run",
    "Sweep": "mil.sweeping",
    "TrainConfig": "mil.config",
    "benchmark": "mil.benchmarking",
    "compare_runs": "mil.compare",
    "compose_config": "mil.config",
    "evaluate_external": "mil.external",
    "export_onnx": "mil.onnx_export",
    "make_ensemble": "mil.ensemble",
    "open_store": "extract.store",
    "pack": "mil.packing",
    "predict": "mil.inference",
    "read_cohort": "mil.cohort",
    "score_runs": "mil.rescoring",
    "sweep": "mil.sweeping",
    "train": "mil.crossval",
    "write_report": "mil.report",
}

__all__ = [
    "Board",
    "Cohort",
    "MilError",
    "Run",
    "Sweep",
    "TrainConfig",
    "benchmark",
    "compare_runs",
    "compose_config",
    "evaluate_external",
    "export_onnx",
    "make_ensemble",
    "open_store",
    "pack",
    "predict",
    "read_cohort",
    "score_runs",
    "sweep",
    "train",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mil' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
