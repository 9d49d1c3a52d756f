"""CPU runtimes: they give torch's embeddings, from several threads at once, and are refused where they do not."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from extract.backbones import runtimes
from extract.backbones.runtimes import (
    RUNTIMES,
    CheckedForward,
    available_runtimes,
    check_parity,
    choose_runtime,
    compile_model,
)
from extract.errors import RuntimeConversionError, RuntimeMissingError, RuntimeParityError

SIDE_PX = 32
DIM = 48


class Small(nn.Module):
    """Convolutions, attention and pooling of a few thousand weights: what real backbones are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, DIM, 4, stride=4)
        self.depthwise = nn.Conv2d(DIM, DIM, 3, padding=1, groups=DIM)
        self.norm, self.attention = nn.LayerNorm(DIM), nn.Linear(DIM, 3 * DIM)

    def forward(self, images: Tensor) -> Tensor:
        tokens = functional.relu6(self.depthwise(self.stem(images))).flatten(2).transpose(1, 2)
        query, key, value = self.attention(self.norm(tokens)).unsqueeze(1).chunk(3, dim=-1)
        return functional.scaled_dot_product_attention(query, key, value).mean(dim=(1, 2))


class FromBytes(nn.Module):
    """The normalisation as a part of the model: uint8 [n, h, w, 3] → embeddings."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tiles: Tensor) -> Tensor:
        embedded: Tensor = self.model(tiles.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1)
        return embedded


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if name not in available_runtimes():
        pytest.skip(f"{name} is not installed")
    return name


@pytest.fixture(scope="module")
def forward(runtime: str, model: nn.Module) -> runtimes.Forward:
    """The small model, compiled once per runtime."""
    return compile_model(model, images_of(0), runtime, threads=2)


def images_of(seed: int, count: int = 4) -> Tensor:
    return torch.randn(count, 3, SIDE_PX, SIDE_PX, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- the same embeddings


def test_embeddings_are_torchs_in_full_precision(model: nn.Module, forward: runtimes.Forward):
    """bfloat16, which some runtimes choose by themselves where a processor has it, is off by 1e-3 and more."""
    with torch.inference_mode():
        expected = model(images_of(1))
    got = forward(images_of(1))
    assert got.dtype == torch.float32
    assert got.shape == (4, DIM)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert check_parity(model, forward, images_of(1)) > 0.999999


def test_the_layout_in_memory_does_not_matter(forward: runtimes.Forward):
    images = images_of(2)
    torch.testing.assert_close(forward(images.to(memory_format=torch.channels_last)), forward(images))


def test_threads_at_once_get_their_own_embeddings(forward: runtimes.Forward):
    batches = [images_of(seed) for seed in range(24)]
    alone = [forward(batch).clone() for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(forward, batches))
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_an_earlier_result_is_not_overwritten(forward: runtimes.Forward):
    first = forward(images_of(3))
    kept = first.clone()
    forward(images_of(4))
    assert torch.equal(first, kept)


def test_a_model_that_takes_bytes_is_compiled_as_well(runtime: str, model: nn.Module):
    tiles = torch.randint(0, 256, (2, SIDE_PX, SIDE_PX, 3), dtype=torch.uint8)
    folded = FromBytes(model).eval()
    forward = compile_model(folded, tiles, runtime, threads=1)
    with torch.inference_mode():
        torch.testing.assert_close(forward(tiles), folded(tiles), rtol=1e-4, atol=1e-5)


def test_a_model_that_cannot_be_converted_is_refused(runtime: str):
    class Odd(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise ValueError("not today")

    if runtime != "torch":
        with pytest.raises(RuntimeConversionError, match=rf"got Odd → {runtime} does not .* → use --runtime torch"):
            compile_model(Odd(), images_of(0), runtime, 1)


# ---------------------------------------------------------------- the parity check


@pytest.mark.parametrize(
    "broken",
    [
        lambda features: features.flip(0),
        lambda features: features.flip(1),
        lambda features: -features,
        lambda features: features * 1.02,
        lambda features: features * torch.nan,
        lambda features: torch.cat([features[:3], features[3:] * torch.inf]),
        lambda features: features * 0,
        lambda features: features[:, :-1],
        lambda features: features + 0.02 * features.norm() * torch.randn(features.shape),
    ],
    ids=["rows", "columns", "sign", "length", "nan", "infinity", "zero", "shape", "noise"],
)
def test_other_embeddings_are_refused(model: nn.Module, broken: Any):
    with pytest.raises(RuntimeParityError, match=r"got embeddings .* → .* → use --runtime torch"):
        check_parity(model, lambda images: broken(model(images)), images_of(0))


def test_the_smallest_cosine_of_all_tiles_is_returned(model: nn.Module):
    def nearly(images: Tensor) -> Tensor:
        features: Tensor = model(images)
        turned = features.clone()
        turned[2, 0] += 0.01 * features[2].norm()
        return turned

    with torch.inference_mode():
        expected = functional.cosine_similarity(model(images_of(0)).double(), nearly(images_of(0)).double())
    assert expected[2] < 1 - 1e-5
    assert check_parity(model, nearly, images_of(0)) == pytest.approx(float(expected[2]), abs=1e-9)
    assert check_parity(torch.zeros_like, torch.zeros_like, torch.zeros(2, 3)) == 1.0


# ---------------------------------------------------------------- what is installed


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    """Make these packages look as if they were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in missing else find(name, *a))


def test_auto_is_the_fastest_installed_runtime(monkeypatch: pytest.MonkeyPatch):
    assert choose_runtime() == available_runtimes()[0]
    without(monkeypatch, "openvino")
    assert available_runtimes() == ["torch"]
    assert choose_runtime() == "torch"


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch, model: nn.Module):
    without(monkeypatch, "openvino")
    with pytest.raises(RuntimeMissingError, match=r'pip install "tessera-mil\[openvino\]"'):
        compile_model(model, images_of(0), "openvino", 1)


def test_an_unknown_runtime_is_refused():
    with pytest.raises(RuntimeMissingError, match="expected auto or one of openvino, torch"):
        choose_runtime("tensorrt")


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_looking_for_runtimes_imports_none():
    code = (
        "import sys; from extract.backbones.runtimes import available_runtimes; available_runtimes(); "
        "print([m for m in ('openvino',) if m in sys.modules])"
    )
    assert run_python(code) == "[]"


@pytest.mark.skipif("openvino" not in available_runtimes(), reason="openvino is not installed")
def test_openvino_does_not_report_its_use_over_the_network():
    code = (
        "import sys, torch; from extract.backbones.runtimes import compile_model; "
        "compile_model(torch.nn.Flatten(), torch.zeros(1, 3, 8, 8), 'openvino', 1); "
        "print([m for m in sys.modules if m.startswith('openvino_telemetry') and sys.modules[m]])"
    )
    assert run_python(code) == "[]"


def test_the_first_batches_of_a_run_are_compared_and_later_ones_are_not(model: nn.Module):
    calls = []

    def reference(images: Tensor) -> Tensor:
        calls.append(len(images))
        features: Tensor = model(images).detach()
        return features

    checked = CheckedForward(reference, lambda images: model(images).detach() * 1.00001, batches=2)
    assert checked.cosine is None
    for seed in range(5):
        checked(images_of(seed))
    assert checked.cosine is not None
    assert 0.9999 < checked.cosine <= 1
    # each comparison asks twice: whether there is a value at all, and which
    assert len(calls) == 4
    with pytest.raises(RuntimeParityError):
        CheckedForward(reference, lambda images: -model(images).detach())(images_of(0))
