"""Inference runtimes for those without a GPU: one forward, computed by torch or OpenVINO.

A runtime changes how an embedding is computed, never what it is: it is used only after `check_parity` has compared it
with torch on real tiles. Converted models live in memory and are gone with the process.
"""

import importlib.util
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from extract.errors import RuntimeConversionError, RuntimeMissingError, RuntimeParityError

RUNTIMES = ("openvino", "torch")
"""Fastest first, as `benchmarks/bench_runtimes.py` measured them; ONNX Runtime was nowhere clearly the fastest."""

MIN_COSINE = 0.9999
MAX_LENGTH_CHANGE = 0.01

Forward = Callable[[Tensor], Tensor]
"""Images [n, 3, h, w] → embeddings, float32 [n, dim]."""


def available_runtimes() -> list[str]:
    """Names of the installed runtimes, fastest first; looks for their packages without importing them."""
    return [name for name in RUNTIMES if importlib.util.find_spec(name)]


def choose_runtime(name: str = "auto") -> str:
    """``auto`` is the fastest installed runtime; any other name is checked and returned.

    Raises:
        RuntimeMissingError: the name is unknown, or its package is not installed.
    """
    if name == "auto":
        return available_runtimes()[0]
    if name not in RUNTIMES:
        raise RuntimeMissingError(
            f"got runtime {name!r} → expected auto or one of {', '.join(sorted(RUNTIMES))} → correct it"
        )
    if name not in available_runtimes():
        raise RuntimeMissingError(
            f'got runtime {name} → its package is not installed → pip install "tessera-mil[{name}]", '
            f"or use --runtime torch"
        )
    return name


def compile_model(model: nn.Module, example: Tensor, runtime: str, threads: int) -> Forward:
    """Compile a model's forward for the CPU.

    The result may be called from several threads at once. Each call computes on one core, since cores with a batch
    each do more than cores that share one.

    Args:
        model: maps the example to embeddings [n, dim], pooling included.
        example: one batch of the shape that all will have, [n, 3, h, w] float32, or whatever else the model takes.
        runtime: as `choose_runtime` returns it.
        threads: how many threads will call at once.

    Raises:
        RuntimeMissingError: the runtime is unknown or not installed.
        RuntimeConversionError: it cannot run a part of the model.
    """
    runtime = choose_runtime(runtime)
    compilers = {"torch": _compile_torch, "openvino": _compile_openvino}
    try:
        return compilers[runtime](model.eval(), example, threads)
    except Exception as error:  # each converter has errors of its own, without a common base
        reason = " ".join(str(error).split())[:200]
        raise RuntimeConversionError(
            f"got {type(model).__name__} → {runtime} does not convert it ({type(error).__name__}: {reason}) → "
            f"use --runtime torch"
        ) from error


def _compile_torch(model: nn.Module, example: Tensor, threads: int) -> Forward:
    @torch.inference_mode()
    def forward(images: Tensor) -> Tensor:
        features: Tensor = model(images)
        return features.float()

    return forward


def _compile_openvino(model: nn.Module, example: Tensor, threads: int) -> Forward:
    openvino = _import_openvino()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of branches on shapes, which are fixed here
        converted = openvino.convert_model(model, example_input=example)
    converted.reshape(list(example.shape))
    # where the processor multiplies bfloat16, OpenVINO would compute in it unasked
    exact = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}
    streams = {"NUM_STREAMS": str(threads), "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(converted, "CPU", exact | streams)
    local = threading.local()

    def forward(images: Tensor) -> Tensor:
        # a request holds the memory of one forward, so each calling thread needs its own
        if not hasattr(local, "request"):
            local.request = compiled.create_infer_request()
        return torch.from_numpy(local.request.infer([images.contiguous().numpy()], share_inputs=True)[0])

    return forward


def _import_openvino() -> Any:
    """Import OpenVINO without the part of it that tells its makers, over the network, that it is in use."""
    if "openvino" not in sys.modules:
        # None makes the import fail, and OpenVINO goes on with a stub
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


@torch.inference_mode()
def check_parity(reference: Forward, candidate: Forward, images: Tensor) -> float:
    """Compare the embeddings of a runtime with those of torch.

    Args:
        reference: torch in float32.
        candidate: the compiled model.
        images: real tiles, prepared as for the reference.

    Returns:
        The smallest cosine between the two embeddings of a tile.

    Raises:
        RuntimeParityError: a cosine is below 0.9999, or a length differs by more than 1 %.
    """
    expected, got = reference(images).double(), candidate(images).double()
    if expected.shape != got.shape:
        raise RuntimeParityError(
            f"got embeddings {list(got.shape)} → torch gives {list(expected.shape)} → use --runtime torch"
        )
    cosines = torch.nn.functional.cosine_similarity(expected, got, dim=1, eps=0.0)
    lengths = got.norm(dim=1) / expected.norm(dim=1)
    same = (expected == got).all(dim=1)
    cosine = float(torch.where(same, 1.0, cosines).min())
    change = float(torch.where(same, 0.0, (lengths - 1).abs()).max())
    # written so that NaN fails
    if not (cosine >= MIN_COSINE and change <= MAX_LENGTH_CHANGE):
        raise RuntimeParityError(
            f"got embeddings whose cosine with torch's is {cosine:.6f} at worst and whose length differs by "
            f"{100 * change:.2g} % → expected at least {MIN_COSINE} and at most {100 * MAX_LENGTH_CHANGE:g} % → "
            f"use --runtime torch"
        )
    return cosine


class CheckedForward:
    """A compiled forward whose first batches, which are real tiles, are also computed by torch and compared.

    Args:
        reference: torch in float32.
        candidate: the compiled model.
        batches: how many are compared.

    Attributes:
        cosine: the smallest cosine so far; None before the first batch.
    """

    def __init__(self, reference: Forward, candidate: Forward, batches: int = 4) -> None:
        self._reference, self._candidate, self._left = reference, candidate, batches
        self._lock = threading.Lock()
        self.cosine: float | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Images [n, 3, h, w] to float32 [n, dim].

        Raises:
            RuntimeParityError: the runtime does not agree with torch.
        """
        with self._lock:
            check, self._left = self._left > 0, self._left - 1
        # what torch cannot compute either is told later, by its slide and value
        if check and bool(self._reference(images).isfinite().all()):
            cosine = check_parity(self._reference, self._candidate, images)
            self.cosine = min(cosine, self.cosine or cosine)
        return self._candidate(images)
