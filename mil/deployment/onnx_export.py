"""Heads as ONNX files: one bag in, its logits and attention out, compared with torch before anybody relies on them."""

import contextlib
import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from aggregators import Aggregator, BagOutput
from aggregators.base import Standardize
from extract.store import Store
from mil.bags.stored import needs_coords, open_bags
from mil.cohort.targets import MULTI_LABEL, REGRESSION, SURVIVAL
from mil.deployment.inference import available_slides, fitting_entry
from mil.deployment.model import load_model, read_members
from mil.errors import MissingExtraError, RunError, listed
from mil.evaluation.tables import value_names
from mil.files import check_new_folder, new_folder, write_atomically, write_json
from mil.training.checkpoint import CheckpointRecord, package_versions
from mil.training.tasks import Record

TOLERANCE = 1e-4
BAG_SIZES = (1, 2, 7, 64, 500)
_EXAMPLE_ROWS = 37
_REAL_BAGS = 8
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class OnnxParity:
    """How far an ONNX file is from the head that it was made of.

    Attributes:
        replica: its name.
        file: name of the ``.onnx`` file.
        sha256: of the file.
        outputs: names of the outputs: ``logits`` [1, C] and, where the head has it, ``attention`` [n, branches].
        temperature: divides the logits of classes and labels; 1 in a run, and of numbers and risks.
        largest_difference: over all outputs and bags.
        bags: sizes of the bags that were compared.
        real_bags: how many of them are slides of a store; the others are random.
        task: what the logits mean, see `record`: of numbers the mean and deviation that make values of
            them, of survival the loss and the edges of the intervals of time.
    """

    replica: str
    file: str
    sha256: str
    outputs: tuple[str, ...]
    temperature: float
    largest_difference: float
    bags: tuple[int, ...]
    real_bags: int
    task: Mapping[str, Any]


def export_onnx(
    run_folder: str | Path,
    out: str | Path,
    store: Store | None = None,
    replicas: Sequence[str] | None = None,
) -> list[OnnxParity]:
    """Write one ``.onnx`` per replica, and ``onnx.json`` with what their users must know.

    Every file takes ``instances`` float32 [n, dim] of one bag, any n from 1. It is run by onnxruntime on bags of
    several sizes and must agree with torch within 1e-4, or nothing is written.

    Args:
        run_folder: written by ``mil train`` or ``mil pack``.
        out: folder to write; must be new or empty.
        store: compare on up to eight of its slides too.
        replicas: which; by default all.

    Raises:
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
        RunError: no run there, ``out`` is taken, or a head that cannot be exported; the message says why.
        CheckpointError: a damaged file, or a store of another recipe.
    """
    _require_packages()
    folder, out = Path(run_folder), Path(out).absolute()
    check_new_folder(out)
    members = read_members(folder)
    if members is not None:
        raise RunError(
            f"got the ensemble {folder} to export → expected a run or a model of one → export its members one by one: "
            f"{listed(map(str, members.folders))}"
        )
    model = load_model(folder, replicas)
    if needs_coords(model.record.keywords):
        raise RunError(
            f"got head {model.record.head!r} of positions={model.record.keywords['positions']!r} to export → the "
            f"file takes instances alone, and this head reads where they lie → keep to torch, or train positions=none"
        )
    real = [] if store is None else _real_bags(store, model.records)
    files, found = dict[str, bytes](), []
    for head, record, temperature in zip(model.heads, model.records, model.temperatures, strict=True):
        bags = [*_random_bags(head), *real]
        content, outputs = to_onnx(head, record.head)
        largest = compare(content, head, record.head, bags)
        name = f"{record.replica}.onnx"
        files[name] = content
        digest = sha256(content).hexdigest()
        sizes = tuple(len(bag) for bag in bags)
        facts = (record.replica, name, digest, outputs, temperature, largest, sizes, len(real), dict(record.task))
        found.append(OnnxParity(*facts))
    with new_folder(out) as partial:
        for name, content in files.items():
            write_atomically(partial / name, content)
        write_json(partial / "onnx.json", _description(model.record, found))
    return found


def to_onnx(head: Aggregator, name: str) -> tuple[bytes, tuple[str, ...]]:
    """A head as the content of an ONNX file, and the names of its outputs.

    Args:
        head: on the CPU.
        name: of the head, for messages.

    Raises:
        MissingExtraError: onnx or onnxscript is not installed.
        RunError: the head does what ONNX has no word for, or works for bags of one size only.
    """
    _require_packages()
    wrapped = _OneBag(copy.deepcopy(head).requires_grad_(False)).eval()
    example = torch.from_numpy(_random_bags(head, (_EXAMPLE_ROWS,))[0])
    try:
        outputs = ("logits", "attention")[: len(wrapped(example))]
        with _quiet():
            program = torch.onnx.export(
                wrapped,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("n", min=1)},),
                input_names=["instances"],
                output_names=list(outputs),
                verbose=False,
            )
            if program is None:
                raise RunError(f"got head {name!r} → torch.onnx gave no program for it → keep to torch for it")
            return _content(program), outputs
    except RunError:
        raise
    # the exporter's own errors have no common base, and those of what it calls come through as they are
    except Exception as error:
        raise RunError(
            f"got head {name!r} to export → it does what ONNX cannot say ({_reason(error)}) → keep to torch for it, or "
            f"train another head, such as abmil"
        ) from error


def _content(program: Any) -> bytes:
    """The program as one file, weights included."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "head.onnx"
        program.save(path, external_data=False)
        return path.read_bytes()


def compare(content: bytes, head: Aggregator, name: str, bags: Sequence[FloatArray]) -> float:
    """The largest difference between an ONNX file and torch over some bags [n, dim].

    Raises:
        RunError: it is above 1e-4, or the file does not take bags of every size.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (dimension, _) = session.get_inputs()[0].shape
    if isinstance(dimension, int):
        raise RunError(
            f"got head {name!r} to export → what it does depends on the size of the bag, and the file would take bags "
            f"of {dimension} instances only → keep to torch for it, or train another head, such as abmil"
        )
    largest = 0.0
    for bag in bags:
        with torch.inference_mode():
            # of the head itself, not of what it says for the export
            expected = _plain(head(torch.from_numpy(bag)))
        for ours, theirs in zip(expected, session.run(None, {"instances": bag}), strict=True):
            difference = float(np.abs(ours.numpy() - theirs).max()) if ours.shape == theirs.shape else np.inf
            # a difference that is not a number is no agreement
            largest = max(largest, difference if np.isfinite(difference) else np.inf)
    if largest > TOLERANCE:
        raise RunError(
            f"got head {name!r} as ONNX, which differs from torch by {largest:.2g} → expected {TOLERANCE:g} at most → "
            f"keep to torch for it"
        )
    return largest


@runtime_checkable
class _Followable(Protocol):
    """A head whose own code asks for the size of a bag, and that says the same as torch.export can follow it."""

    def one_bag(self, instances: Tensor) -> tuple[Tensor, Tensor]:
        """Instances [n, dim] to logits [1, C] and attention [n, 1]."""


class _OneBag(nn.Module):
    """A head that is given one bag, and returns plain tensors."""

    def __init__(self, head: Aggregator) -> None:
        super().__init__()
        self.head = head

    def forward(self, instances: Tensor) -> tuple[Tensor, ...]:
        """Instances [n, dim] to logits [1, C] and, where there is one, attention [n, branches]."""
        if isinstance(self.head, _Followable):
            return self.head.one_bag(instances)
        return _plain(self.head(instances))


def _plain(output: BagOutput) -> tuple[Tensor, ...]:
    return (output.logits,) if output.attention is None else (output.logits, output.attention)


def _random_bags(head: Aggregator, sizes: Sequence[int] = BAG_SIZES) -> list[FloatArray]:
    """Seeded normal instances, of the mean and deviation that a head which standardises has seen in training."""
    rng = np.random.default_rng(0)
    mean: npt.NDArray[Any] = np.zeros(1, np.float32)
    std: npt.NDArray[Any] = np.ones(1, np.float32)
    if isinstance(head.input_norm, Standardize):
        mean, std = head.input_norm.mean.numpy(), head.input_norm.std.numpy()
    return [mean + std * rng.standard_normal((size, head.in_dim), dtype=np.float32) for size in sizes]


def _real_bags(store: Store, records: Sequence[CheckpointRecord]) -> list[FloatArray]:
    """The first slides of a store, as the heads would see them."""
    entry = fitting_entry(store, records, None)
    ids = available_slides(store, records[:1], entry)[:_REAL_BAGS]
    bags = open_bags(store, ids, entry, "mmap")
    return [bags.pack(np.array([at])).instances.float().numpy() for at in range(len(bags))]


def _description(record: CheckpointRecord, found: Sequence[OnnxParity]) -> dict[str, Any]:
    """The content of ``onnx.json``."""
    return {
        "input": {"name": "instances", "dtype": "float32", "shape": ["n", record.in_dim]},
        "target": record.target,
        "task": record.task["task"],
        "columns": list(record.task.get("columns", [record.target])),
        "class_names": list(record.class_names),
        "value_names": list(
            value_names(record.task) if record.outputs else (f"p_{name}" for name in record.class_names)
        ),
        "values": f"mean over the files of {_formula(record.task)}",
        "feature_recipe": dict(record.feature_recipe),
        "tile_recipe": dict(record.tile_recipe),
        "tolerance": TOLERANCE,
        "versions": package_versions() | _versions(),
        "files": [asdict(each) for each in found],
    }


def _formula(task: Record) -> str:
    """How a file's logits become what `mil.predict` says, see `mil.training.tasks.decode`."""
    if task["task"] == MULTI_LABEL:
        return "sigmoid(logits / temperature)"
    if task["task"] == REGRESSION:
        return "logits * deviation + mean, both by column, of the file's task"
    if task["task"] == SURVIVAL and task["loss"] == "cox":
        return "logits, the log hazard: higher for those who are expected to die sooner"
    if task["task"] == SURVIVAL:
        return (
            "-sum(cumprod(1 - sigmoid(logits))) over the intervals of time, the expected number of intervals survived "
            "with its sign turned: higher for those who are expected to die sooner"
        )
    return "softmax(logits / temperature)"


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in _PACKAGES}


def _require_packages() -> None:
    from importlib.util import find_spec

    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f'got no {", ".join(missing)} → expected them for the export to ONNX → run pip install "tessera-mil[onnx]"'
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter prints and warns of on its way; what fails is raised all the same."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _reason(error: Exception) -> str:
    """The innermost cause, in one line."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
