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
        "exports",
        "backbones",
        "planning",
        "reading",
        "slides",
        "store.core",
        "store.foreign.layouts",
        "store.formats",
        "store.upkeep",
        "synthetic",
        "tiling",
        "errors",
        "pipeline.gpu",
        "geometry",
        "store.core.fingerprint",
        "store.core.ids",
        "store.core.rows",
        "store.core.unit",
        "store.core.remote_path",
        "store.core.files",
        "store.core.index",
        "store.core.run_log",
        "store.core.draft",
        "store.core.store",
        "store.base",
        "store.formats.nodes",
        "store.formats.zarr_store",
        "store.formats.remote_log",
        "store.formats.remote_store",
        "store.formats.h5_file",
        "store.formats.tool_attributes",
        "store.formats.h5_store",
        "store.formats.opening",
        "store.upkeep.convert",
        "store.upkeep.summary",
        "store.upkeep.checks",
        "store.upkeep.node_form",
        "store.upkeep.verify",
        "store.upkeep.repair",
        "store",
        "store.foreign.layouts.base",
        "store.foreign.layouts.matrices",
        "store.foreign.layouts.frames",
        "store.foreign.layouts.hdf5",
        "store.foreign.layouts.torch_files",
        "store.foreign.recipes",
        "store.foreign.layouts.trident",
        "store.foreign.layouts.clam",
        "store.foreign.layouts.stamp",
        "store.foreign.layouts.atlaspatch",
        "store.foreign.layouts.plain_h5",
        "store.foreign.layouts.slideflow",
        "store.foreign.layouts.wsidata",
        "store.foreign.layouts.classic",
        "store.foreign.detect",
        "store.foreign.importing",
        "store.foreign.spatialdata",
        "store.foreign.exporting",
        "store.foreign",
        "slides.direct",
        "slides.slide",
        "slides.image",
        "slides.masks",
        "synthetic.cohort",
        "slides.sources",
        "tiling.pen",
        "tiling.quality",
        "tiling.tissue",
        "tiling.tiles",
        "backbones.views",
        "backbones.runtimes",
        "backbones.presets",
        "backbones.architectures",
        "backbones.weights",
        "backbones.hub",
        "backbones.transformers_models",
        "backbones.backbone",
        "backbones.verification",
        "memory",
        "reading.channel",
        "reading.ring",
        "reading.reader",
        "reading.isolation",
        "pipeline.stream",
        "pipeline.parity",
        "pipeline.extraction",
        "pipeline",
        "pipeline.fleet",
        "planning.doctor",
        "planning.plan",
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
        "cli.heads",
        "cli.slides",
        "cohort",
        "config",
        "deployment",
        "evaluation",
        "experiments",
        "reports",
        "runs",
        "splits",
        "statistics",
        "training",
        "tuning",
        "visualization",
        "errors",
        "files",
        "cohort.targets",
        "evaluation.headlines",
        "statistics.metrics",
        "statistics.bootstrap",
        "statistics.checks",
        "statistics.classification",
        "statistics.survival",
        "statistics.regression",
        "statistics.multi_label",
        "statistics.paired_tests",
        "statistics.delong",
        "statistics.power",
        "statistics.calibration",
        "statistics.label_calibration",
        "statistics.abstention",
        "bags.devices",
        "cohort.cohort",
        "deployment.cohort_counts",
        "runs.look_ledger",
        "splits.patients",
        "splits.record",
        "splits.splits",
        "splits.sites",
        "splits.fixed",
        "splits.tables",
        "splits.plan",
        "config.options",
        "config.head_keywords",
        "config.train",
        "runs.folders",
        "config.preflight",
        "tuning.search_space",
        "tuning.sweep_config",
        "tuning.tpe",
        "bags.bags",
        "bags",
        "bags.augment",
        "training.losses",
        "experiments.cox",
        "training.tasks",
        "evaluation.tables",
        "training.compound",
        "training.optimizers",
        "bags.samplers",
        "training.weight_average",
        "training.checkpoint",
        "runs.lineage",
        "training.warm_start",
        "bags.forward",
        "training.loop",
        "experiments.tracking",
        "training.resume",
        "training.stacked",
        "training.replicas",
        "runs.run",
        "evaluation.predictions",
        "tuning.trials",
        "tuning.importance",
        "evaluation.paired",
        "experiments.baselines",
        "evaluation.fold_scores",
        "evaluation.scoring",
        "evaluation.temperature",
        "evaluation.operating_points",
        "evaluation.averaging",
        "deployment.artefact",
        "runs.run_folder",
        "evaluation.members",
        "evaluation.gains",
        "runs.ensemble",
        "runs.saved_outcomes",
        "evaluation.abstention_rule",
        "visualization.plotting",
        "tuning.sweep_figures",
        "statistics.curves",
        "visualization.curve_figures",
        "visualization.target_figures",
        "visualization.html_page",
        "visualization.slide_picture",
        "visualization.contact_sheet",
        "runs.run_tables",
        "reports.page",
        "reports.target_report",
        "reports.report",
        "experiments.crossval",
        "tuning.sweep",
        "tuning.sweep_page",
        "experiments.leaderboard",
        "experiments.leaderboard_page",
        "experiments.compare",
        "experiments.benchmark",
        "deployment.model",
        "deployment.predictions",
        "deployment.embed",
        "deployment.inference",
        "deployment.target_card",
        "deployment.model_card",
        "deployment.packing",
        "deployment.external",
        "reports.rescore",
        "deployment.onnx_export",
        "demo",
        "cli.console",
        "__init__",
        "cli.heads.benchmark",
        "cli.heads.compare",
        "cli.heads.config",
        "cli.slides.extract",
        "cli.slides.models",
        "cli.slides.sheet",
        "cli.slides.plan",
        "cli.heads.predict",
        "cli.heads.score",
        "cli.slides.store",
        "cli.heads.sweep",
        "cli.slides.foreign",
        "cli.main",
        "cli",
    ],
}

MAY_IMPORT = {"extract": {"extract"}, "aggregators": {"aggregators"}, "mil": {"mil", "extract", "aggregators"}}

TORCH_FREE = ("extract.store", "extract.geometry", "extract.errors", "extract.memory", "extract.exports")
"""What mil may import of extract anywhere."""

RUNS_EXTRACTION = {
    "mil.visualization.contact_sheet",
    "mil.deployment.embed",
    "mil.cli.main",
    "mil.cli",
    "mil.cli.slides.extract",
    "mil.cli.slides.models",
    "mil.cli.slides.plan",
    "mil.cli.slides.store",
    "mil.deployment.inference",
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
