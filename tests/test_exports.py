"""The public names, pinned: a change here is a change for users and belongs in the changelog."""

import importlib
from pathlib import Path

import pytest

EXPORTS = {
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
