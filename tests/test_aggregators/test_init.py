"""The public names of the package, and the examples in its docstrings."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import aggregators

MODULES = ["aggregators", *(f"aggregators.{module.name}" for module in pkgutil.iter_modules(aggregators.__path__))]


def test_exports_are_pinned():
    assert aggregators.__all__ == [
        "ABMIL",
        "ACMIL",
        "DSMIL",
        "DTFD",
        "ILRA",
        "AdditiveMIL",
        "Aggregator",
        "AggregatorError",
        "AggregatorRecord",
        "BagDraws",
        "BagInputError",
        "BagOutput",
        "Chowder",
        "ClamMB",
        "ClamSB",
        "DrawSource",
        "DuplicateAggregatorError",
        "HeadConfigError",
        "InstanceMax",
        "LogSumExp",
        "MaxPool",
        "MeanPool",
        "NoisyOr",
        "OfficialStateError",
        "OffsetsError",
        "RegistryError",
        "TopK",
        "TransMIL",
        "TransformerAggregator",
        "UnknownAggregatorError",
        "UnknownKeywordError",
        "aggregator_record",
        "bag_generator",
        "create_aggregator",
        "keyword_names",
        "list_aggregators",
        "register_aggregator",
    ]
    assert all(hasattr(aggregators, name) for name in aggregators.__all__)


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples_run(module):
    loaded = importlib.import_module(module)
    result = doctest.testmod(loaded, globs={**vars(loaded), "torch": torch})
    assert result.failed == 0
    assert result.attempted > 0 or module == "aggregators.errors"


def test_every_error_descends_from_one_base_and_a_builtin():
    errors = [getattr(aggregators, name) for name in aggregators.__all__ if name.endswith("Error")]
    for error in errors:
        assert issubclass(error, aggregators.AggregatorError)
        if error not in (aggregators.AggregatorError, aggregators.RegistryError):
            assert issubclass(error, ValueError | LookupError | TypeError)
