"""Data flows one way: two leaves (extract, aggregators), one trunk (mil), and no file imports upward.

A new file takes its place in ``ORDER``: it may import what stands before it in its package.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

ORDER = {
    "extract": [
        "errors",
        "gpu",
        "geometry",
        "store.fingerprint",
        "store.ids",
        "store.rows",
        "store.unit",
        "store.remote_path",
        "store.files",
        "store.index",
        "store.run_log",
        "store.draft",
        "store.base",
        "store.nodes",
        "store.zarr_store",
        "store.remote_log",
        "store.remote_store",
        "store.h5_file",
        "store.tool_attributes",
        "store.h5_store",
        "store.backends",
        "store.convert",
        "store.summary",
        "store.checks",
        "store.node_form",
        "store.verify",
        "store.repair",
        "store",
        "store.foreign.base",
        "store.foreign.matrices",
        "store.foreign.frames",
        "store.foreign.hdf5",
        "store.foreign.torch_files",
        "store.foreign.recipes",
        "store.foreign.trident",
        "store.foreign.clam",
        "store.foreign.stamp",
        "store.foreign.atlaspatch",
        "store.foreign.plain_h5",
        "store.foreign.slideflow",
        "store.foreign.wsidata",
        "store.foreign.classic",
        "store.foreign.detect",
        "store.foreign.importing",
        "store.foreign.spatialdata",
        "store.foreign.exporting",
        "store.foreign",
        "direct",
        "slide",
        "image",
        "masks",
        "synthetic",
        "sources",
        "pen",
        "quality",
        "tissue",
        "tiles",
        "views",
        "runtimes",
        "presets",
        "architectures",
        "weights",
        "hub",
        "remote",
        "backbones",
        "verification",
        "memory",
        "channel",
        "ring",
        "reader",
        "isolation",
        "engine",
        "parity",
        "pipeline",
        "fleet",
        "doctor",
        "plan",
        "__init__",
    ],
    "aggregators": [
        "errors",
        "segment",
        "draws",
        "official",
        "norm",
        "base",
        "registry",
        "positions",
        "pooling",
        "gated_attention",
        "abmil",
        "transformer",
        "target_losses",
        "instance",
        "instance_max",
        "lse",
        "topk",
        "noisy_or",
        "chowder",
        "additive",
        "clam",
        "dsmil",
        "dtfd",
        "acmil",
        "ilra",
        "transmil",
        "__init__",
    ],
    "mil": [
        "errors",
        "files",
        "targets",
        "metric_names",
        "metrics",
        "bootstrap",
        "slide_values",
        "statistics",
        "survival",
        "regression",
        "multi_label",
        "comparison",
        "delong",
        "power",
        "calibration",
        "label_calibration",
        "abstention",
        "usage",
        "cohort",
        "target_counts",
        "looks",
        "patients",
        "split_record",
        "splits",
        "site_splits",
        "fixed_splits",
        "split_files",
        "split_plan",
        "recipes",
        "head_keywords",
        "config",
        "out_folders",
        "early",
        "space",
        "sweep_config",
        "tpe",
        "bags",
        "augment",
        "losses",
        "cox",
        "tasks",
        "out_of_fold",
        "compound",
        "optim",
        "samplers",
        "ema",
        "checkpoint",
        "training_cohort",
        "initial",
        "evaluation",
        "training",
        "tracking",
        "unfinished",
        "stacked",
        "replicas",
        "run",
        "outcomes",
        "trials",
        "sensitivity",
        "pairs",
        "baselines",
        "fold_scores",
        "scoring",
        "temperature",
        "thresholds",
        "averaging",
        "artefact",
        "saved_run",
        "member_predictions",
        "gains",
        "ensemble",
        "saved_outcomes",
        "answering",
        "plotting",
        "sweep_figures",
        "curves",
        "curve_figures",
        "target_figures",
        "page",
        "slide_picture",
        "contact_sheet",
        "run_files",
        "run_page",
        "target_report",
        "report",
        "crossval",
        "sweeping",
        "sweep_page",
        "board",
        "board_page",
        "compare",
        "benchmarking",
        "model",
        "predictions",
        "extraction",
        "inference",
        "target_card",
        "model_card",
        "packing",
        "external",
        "rescoring",
        "onnx_export",
        "demo",
        "console",
        "__init__",
        "cli_benchmark",
        "cli_compare",
        "cli_config",
        "cli_extract",
        "cli_models",
        "cli_sheet",
        "cli_plan",
        "cli_predict",
        "cli_score",
        "cli_store",
        "cli_sweep",
        "cli_foreign",
        "cli",
    ],
}

MAY_IMPORT = {"extract": {"extract"}, "aggregators": {"aggregators"}, "mil": {"mil", "extract", "aggregators"}}

TORCH_FREE = ("extract.store", "extract.geometry", "extract.errors", "extract.memory")
"""What mil may import of extract anywhere."""

RUNS_EXTRACTION = {
    "mil.contact_sheet",
    "mil.extraction",
    "mil.cli",
    "mil.cli_extract",
    "mil.cli_models",
    "mil.cli_plan",
    "mil.cli_store",
    "mil.inference",
    "mil.viewer",
    "mil.demo",
}
"""These may import the rest of extract too, inside functions."""


def modules(root: Path, package: str) -> dict[str, Path]:
    """Dotted name below the package → file; ``__init__`` is the package itself."""
    found = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root / package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports(root: Path, name: str, path: Path) -> Iterator[tuple[str, bool]]:
    """(dotted module of ours, whether inside a function) for every import in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(child) for function in functions for child in ast.walk(function)}
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            # "from a import b" loads a.b where that is a module, and a otherwise
            targets = [f"{source}.{a.name}" if _is_module(root, f"{source}.{a.name}") else source for a in node.names]
        for target in targets:
            if target.split(".")[0] in ORDER:
                yield target, id(node) in inside


def _is_module(root: Path, dotted: str) -> bool:
    path = root.joinpath(*dotted.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def _rank(package: str, dotted: str) -> int:
    """Place of a module in its package's order; -1 when it is not in the list."""
    below = dotted.removeprefix(package).removeprefix(".") or "__init__"
    return ORDER[package].index(below) if below in ORDER[package] else -1


def breaches(root: Path) -> list[str]:
    """Every import that goes upward or across, and every file that has no place in the order."""
    found = []
    for package in ORDER:
        for below, path in modules(root, package).items():
            name = package if below == "__init__" else f"{package}.{below}"
            rank = _rank(package, name)
            if rank < 0:
                found.append(f"{name} has no place in ORDER")
            for target, in_function in imports(root, name, path):
                other = target.split(".")[0]
                if other not in MAY_IMPORT[package]:
                    found.append(f"{name} imports {target}: {package} imports {sorted(MAY_IMPORT[package])} only")
                elif other == package:
                    if not 0 <= _rank(package, target) < rank:
                        found.append(f"{name} imports {target}: upward")
                elif other == "extract" and not target.startswith(TORCH_FREE):
                    if name not in RUNS_EXTRACTION:
                        found.append(f"{name} imports {target}: only {sorted(RUNS_EXTRACTION)} may")
                    elif not in_function:
                        found.append(f"{name} imports {target}: inside a function only")
    return found


def test_no_import_goes_upward_or_across():
    assert breaches(REPOSITORY) == []


def test_the_order_names_each_file_once():
    for package, order in ORDER.items():
        assert len(set(order)) == len(order)
        assert order, package
        assert set(modules(REPOSITORY, package)) <= set(order)


GOOD = {
    "extract/__init__.py": "",
    "extract/errors.py": "import os",
    "extract/geometry.py": "from extract.errors import X",
    "extract/store/__init__.py": "from extract.store.base import B\nfrom . import base",
    "extract/store/base.py": "from ..errors import X",
    "extract/pipeline.py": "from extract import store\nimport torch",
    "aggregators/__init__.py": "from aggregators.abmil import A",
    "aggregators/abmil.py": "def f():\n    from aggregators import base",
    "aggregators/base.py": "",
    "mil/__init__.py": "",
    "mil/errors.py": "",
    "mil/bags.py": "from extract.store import open_store\nimport aggregators.base\nfrom mil import errors",
    "mil/cli.py": "def extract():\n    from extract.pipeline import run_extraction\n    import mil.bags",
}


@pytest.mark.parametrize(
    ("file", "text", "breach"),
    [
        ("extract/errors.py", "from extract.geometry import Y", "extract.errors imports extract.geometry: upward"),
        ("extract/errors.py", "from .geometry import Y", "extract.errors imports extract.geometry: upward"),
        ("extract/errors.py", "from . import geometry", "extract.errors imports extract.geometry: upward"),
        (
            "extract/errors.py",
            "def f():\n    import extract.pipeline",
            "extract.errors imports extract.pipeline: upward",
        ),
        ("extract/geometry.py", "from extract import open_store", "extract.geometry imports extract: upward"),
        ("extract/store/base.py", "from . import B", "extract.store.base imports extract.store: upward"),
        ("extract/pipeline.py", "import mil", "extract.pipeline imports mil: extract imports ['extract'] only"),
        ("extract/pipeline.py", "from mil.bags import B", "extract.pipeline imports mil.bags"),
        ("extract/pipeline.py", "def f():\n    from aggregators import A", "extract.pipeline imports aggregators"),
        ("aggregators/base.py", "import extract.store", "aggregators.base imports extract.store"),
        ("aggregators/base.py", "from mil import errors", "aggregators.base imports mil.errors"),
        (
            "aggregators/base.py",
            "from aggregators.abmil import A",
            "aggregators.base imports aggregators.abmil: upward",
        ),
        ("mil/errors.py", "import mil.bags", "mil.errors imports mil.bags: upward"),
        ("mil/bags.py", "import extract.pipeline", "mil.bags imports extract.pipeline: only"),
        ("mil/bags.py", "def f():\n    from extract.slide import Slide", "mil.bags imports extract.slide: only"),
        ("mil/bags.py", "from extract import open_store", "mil.bags imports extract: only"),
        ("mil/cli.py", "from extract.pipeline import r", "mil.cli imports extract.pipeline: inside a function only"),
        (
            "mil/cli.py",
            "if True:\n    import extract.backbones",
            "mil.cli imports extract.backbones: inside a function",
        ),
        ("mil/novelty.py", "", "mil.novelty has no place in ORDER"),
        ("extract/store/novelty.py", "", "extract.store.novelty has no place in ORDER"),
    ],
)
def test_a_breach_is_found(tmp_path: Path, file: str, text: str, breach: str):
    for name, content in (GOOD | {file: text}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    found = breaches(tmp_path)
    assert len(found) == 1
    assert found[0].startswith(breach)


def test_what_is_allowed_is_no_breach(tmp_path: Path):
    for name, content in GOOD.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert breaches(tmp_path) == []
