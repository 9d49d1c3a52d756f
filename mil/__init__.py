"""Multiple-instance learning on cached bags: cohorts, honest training and evaluation, prediction, reports.

Names are resolved on first use, so that ``import mil`` stays light.
"""

from extract.exports import MovedModules, lazy_exports

# no name is that of a module of mil: importing the module would put it in the name's place
_HOME = {
    "Board": "mil.experiments.leaderboard",
    "Cohort": "mil.cohort.cohort",
    "MilError": "mil.errors",
    "Run": "mil.runs.run",
    "Sweep": "mil.tuning.sweep_folder",
    "TrainConfig": "mil.config.train",
    "benchmark": "mil.experiments.benchmark",
    "compare_runs": "mil.experiments.compare",
    "compose_config": "mil.config.compose",
    "evaluate_external": "mil.deployment.external",
    "export_onnx": "mil.deployment.onnx_export",
    "make_ensemble": "mil.runs.ensemble",
    "open_store": "extract.store",
    "pack": "mil.deployment.packing",
    "predict": "mil.deployment.inference",
    "read_cohort": "mil.cohort.reading",
    "score_runs": "mil.reports.rescore",
    "sweep": "mil.tuning.sweep",
    "train": "mil.experiments.crossval",
    "write_report": "mil.reports.report",
}

__all__ = list(_HOME)
__getattr__ = lazy_exports(__name__, _HOME)

# what was imported from its own file in 0.1, for one version more
MovedModules(
    {
        "mil.benchmarking": ("mil.experiments.benchmark", "mil.experiments.benchmark_config"),
        "mil.board": ("mil.experiments.leaderboard",),
        "mil.checkpoint": ("mil.training.checkpoint",),
        "mil.compare": ("mil.experiments.compare",),
        "mil.crossval": ("mil.experiments.crossval",),
        "mil.ensemble": ("mil.runs.ensemble",),
        "mil.external": ("mil.deployment.external",),
        "mil.inference": ("mil.deployment.inference",),
        "mil.metrics": ("mil.statistics.metrics",),
        "mil.onnx_export": ("mil.deployment.onnx_export",),
        "mil.packing": ("mil.deployment.packing",),
        "mil.report": ("mil.reports.report",),
        "mil.rescoring": ("mil.reports.rescore",),
        "mil.run": ("mil.runs.run", "mil.evaluation.replica_predictions"),
        "mil.sweeping": ("mil.tuning.sweep", "mil.tuning.sweep_folder"),
        "mil.targets": ("mil.cohort.targets",),
    }
).install()
