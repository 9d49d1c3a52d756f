"""The public names, pinned: a change here is a change for users and belongs in the changelog."""

import importlib
import re
import sys
from pathlib import Path

import pytest

EXPORTS = {
    "extract.backbones": ["Backbone", "DEFAULT_BACKBONE", "list_backbones", "load_backbone"],
    "extract.pipeline": ["ExtractionReport", "Progress", "SlideOutcome", "run_extraction"],
    "extract.synthetic": ["lesion_tiles", "make_cohort", "read_lesions", "write_pyramid"],
    "mil.bags": ["Bags", "open_bags"],
    "mil.cohort": ["Attrition", "Cohort", "join_store", "read_cohort"],
    "mil.config": [
        "AugmentConfig",
        "HeadConfig",
        "LossConfig",
        "OptimizerConfig",
        "SchedulerConfig",
        "TrainConfig",
        "compose_config",
        "parse_overrides",
    ],
    "mil.splits": ["Splits", "make_splits", "read_splits", "verify_splits", "write_splits"],
    "extract": [
        "ExtractError",
        "Slide",
        "TileRecipe",
        "list_backbones",
        "load_backbone",
        "open_store",
        "run_extraction",
    ],
    "extract.store": [
        "AugmentRecipe",
        "ConversionReport",
        "Execution",
        "FeatureRecipe",
        "H5Store",
        "PenRecipe",
        "QualityRecipe",
        "SlideFingerprint",
        "SlideReader",
        "Store",
        "TileRecipe",
        "TilesUnit",
        "TissueRecipe",
        "TransformRecipe",
        "ZarrStore",
        "convert_store",
        "create_store",
        "difference",
        "find_format",
        "fingerprint",
        "from_dict",
        "open_store",
        "to_dict",
    ],
    "mil": [
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
    ],
}


@pytest.mark.parametrize("package", EXPORTS)
def test_the_exports_are_these(package: str):
    assert importlib.import_module(package).__all__ == EXPORTS[package]


@pytest.mark.parametrize("package", EXPORTS)
def test_every_export_is_there_and_documented(package: str):
    module = importlib.import_module(package)
    for name in EXPORTS[package]:
        assert (getattr(module, name).__doc__ or "").strip(), name


MOVED = {
    "extract.plan": "plan_extraction",
    "extract.presets": "PRESETS",
    "extract.slide": "Slide",
    "extract.tissue": "tissue_mask",
    "mil.benchmarking": "benchmark",
    "mil.board": "Board",
    "mil.checkpoint": "load_checkpoint",
    "mil.compare": "compare_runs",
    "mil.crossval": "train",
    "mil.ensemble": "make_ensemble",
    "mil.external": "evaluate_external",
    "mil.inference": "predict",
    "mil.metrics": "macro_f1",
    "mil.onnx_export": "export_onnx",
    "mil.packing": "pack",
    "mil.report": "write_report",
    "mil.rescoring": "score_runs",
    "mil.run": "Run",
    "mil.sweeping": "sweep",
    "mil.targets": "TASKS",
}
"""Modules of 0.1 and a name in each."""


@pytest.mark.parametrize("module", MOVED)
def test_a_module_that_moved_is_found_for_one_version_and_says_where_it_is_now(module: str) -> None:
    importlib.import_module(module.split(".")[0])
    sys.modules.pop(module, None)
    with pytest.warns(DeprecationWarning, match=rf"{module} is now (\S+)") as seen:
        old = importlib.import_module(module)
    homes = re.match(r"\S+ is now (.*); the old", str(seen[0].message))[1].split(" and ")
    new = [vars(importlib.import_module(home)) for home in homes]
    assert any(each.get(MOVED[module]) is getattr(old, MOVED[module]) for each in new)


def test_modules_that_never_were_are_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match="novelty"):
        importlib.import_module("mil.novelty")


def test_an_unknown_name_is_an_attribute_error():
    import extract

    with pytest.raises(AttributeError, match="run_extractoin"):
        extract.run_extractoin  # noqa: B018


def test_no_export_is_hidden_by_a_module_of_its_name():
    import mil

    folder = Path(mil.__file__).parent
    assert not {path.stem for path in folder.iterdir()} & set(mil.__all__)
    for name in mil.__all__:
        assert getattr(mil, name) is getattr(mil, name)


def test_the_sweeps_older_name_for_importances_warns() -> None:
    from mil.tuning.sweep_folder import Sweep

    found = Sweep.__new__(Sweep)
    object.__setattr__(found, "importances", ("one",))
    with pytest.warns(DeprecationWarning, match="importances"):
        assert found.sensitivities == ("one",)
