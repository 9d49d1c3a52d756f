"""Frozen backbones: a preset or any timm model, its weights, and uint8 tiles in, embeddings out."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from extract.backbones.architectures import create_architecture
from extract.backbones.checkpoints import load_own
from extract.backbones.hub import fetch, offline_if_unreachable
from extract.backbones.presets import DEFAULT_BACKBONE, PRESETS, Preset, find_preset
from extract.backbones.runtimes import CheckedForward, choose_runtime, compile_model
from extract.backbones.transformers_models import PREFIX, load_remote
from extract.backbones.transforms import choose_statistics, describe_transform, own_transform
from extract.backbones.weights import adapt_state, hash_state, load_state, read_weights, read_wheel_weights
from extract.errors import BackboneError, FeatureRangeError
from extract.store import Execution, FeatureRecipe, TransformRecipe

POOLINGS = ("model", "avg", "cls", "cls+avg")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BACKBONES = PRESETS
_PROBE_PX = 1024


def list_backbones() -> list[str]:
    """Names of the presets; any timm name and ``hf-hub:`` name works too."""
    return sorted(PRESETS)


class PooledModel(nn.Module):
    """A model with its pooling: images [n, 3, s, s] to features [n, dim].

    Args:
        model: its ``forward`` is the pooling ``model``; the others take ``forward_features``.
        pooling: one of `POOLINGS`.
    """

    def __init__(self, model: nn.Module, pooling: str) -> None:
        super().__init__()
        self.model, self.pooling = model, pooling

    def forward(self, images: Tensor) -> Tensor:
        """Images [n, 3, s, s] to features [n, dim]."""
        return _pool(self.model, images, self.pooling)


class Backbone:
    """A frozen backbone on a device.

    Args:
        model: images [n, 3, s, s] to features; `forward_features` gives maps or tokens where a pooling needs them.
        recipe: what a row of its output is.
        device: where it runs.
        precision: ``auto`` (``fp32`` on a CPU, ``bf16`` on CUDA), ``fp32``, or autocast to ``bf16`` or ``fp16``.
        compile: compile the model with ``torch.compile``; on CUDA only.

    Attributes:
        recipe: what a row of its output is.
        device: where it runs.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        compiled: whether the model is compiled.
        runtime: what computes: ``torch``, ``torch.compile`` or ``openvino``.
        module: the model with its pooling, images [n, 3, s, s] to [n, dim].
        notes: lines on own weights, for who prints: what was taken from the file, how tiles are normalised.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: FeatureRecipe,
        device: torch.device,
        precision: str = "auto",
        compile: bool = False,
    ) -> None:
        self.recipe = recipe
        self.notes: tuple[str, ...] = ()
        self.device = device
        self.precision = choose_precision(precision, device)
        self.compiled = compile and device.type == "cuda"
        self._model = model.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)
        self.module: nn.Module = PooledModel(self._model, recipe.pooling).eval()
        self.runtime = "torch.compile" if self.compiled else "torch"
        self._run: Callable[[Tensor], Tensor] = torch.compile(self.module) if self.compiled else self.module
        transform = recipe.transform
        self._scale = (1.0 / (255.0 * torch.tensor(transform.std))).view(1, 3, 1, 1).to(device)
        self._shift = (-torch.tensor(transform.mean) / torch.tensor(transform.std)).view(1, 3, 1, 1).to(device)

    def embed(self, tiles: np.ndarray) -> np.ndarray:
        """Embed tiles.

        Args:
            tiles: uint8 [n, size, size, 3]. Give every call the same n: a backbone's last bits depend on it.

        Returns:
            float32 [n, dim].
        """
        return self.forward(self.prepare(tiles)).cpu().numpy()

    @torch.inference_mode()
    def prepare(self, tiles: np.ndarray | Tensor) -> Tensor:
        """Normalised images of the model's size.

        Args:
            tiles: uint8 [n, size, size, 3], on any device.

        Returns:
            float32 [n, 3, input, input] on the backbone's device.
        """
        pixels = torch.from_numpy(tiles) if isinstance(tiles, np.ndarray) else tiles
        pixels = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        images = torch.addcmul(self._shift, pixels.to(torch.float32), self._scale)
        transform = self.recipe.transform
        if images.shape[-1] != transform.input_px:
            size = (transform.input_px, transform.input_px)
            images = functional.interpolate(images, size, mode=transform.interpolation, antialias=True)
        return images

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Embeddings of images that `prepare` made.

        Args:
            images: float32 [n, 3, input, input] on the backbone's device.

        Returns:
            float32 [n, dim] on the backbone's device.
        """
        dtype = PRECISIONS[self.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            return self._run(images).float()

    def use_runtime(self, runtime: str, batch_size: int, threads: int) -> CheckedForward | None:
        """Compute on the CPU by another runtime from now on; its first batches are compared with torch's.

        Args:
            runtime: as `extract.backbones.runtimes.choose_runtime` takes it.
            batch_size: tiles per call.
            threads: threads that will call at once.

        Returns:
            The forward that knows how well it agrees with torch; None where torch goes on.

        Raises:
            RuntimeMissingError: the runtime is unknown or not installed.
            RuntimeConversionError: it cannot run a part of the model.
        """
        fits = self.device.type == "cpu" and self.precision == "fp32"
        chosen = choose_runtime(runtime) if fits or runtime != "auto" else "torch"
        if chosen == "torch":
            return None
        if not fits:
            raise BackboneError(
                f"got runtime {chosen} on {self.device} in {self.precision} → runtimes compute on a CPU in fp32 → "
                f"leave --runtime out"
            )
        size = self.recipe.transform.input_px
        compiled = compile_model(self.module, torch.zeros(batch_size, 3, size, size), chosen, threads)
        self.runtime, self._run = chosen, CheckedForward(self.module, compiled)
        return self._run

    def share(self, other: "Backbone") -> None:
        """Compute by what another backbone of the same weights computes by."""
        self.runtime, self._run = other.runtime, other._run

    def execution(self, batch_size: int) -> Execution:
        """How this process computes: precision, runtime, device, versions."""
        import timm

        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        versions = {"torch": torch.__version__, "timm": timm.__version__}
        if self.runtime == "openvino":
            versions[self.runtime] = version(self.runtime)
        return Execution(self.precision, self.runtime, device, batch_size, versions)


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
    precision: str = "auto",
    compile: bool = False,
    allow_remote_code: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Backbone:
    """Load a frozen backbone.

    Args:
        name: a preset, any timm model name, ``hf-hub:owner/model``, or ``transformers:owner/model@commit``.
        weights: a local file instead of the usual ones: safetensors, or PyTorch read with ``weights_only=True``.
        pooling: ``model`` (the preset's or the model's own), ``avg``, ``cls`` or ``cls+avg``.
        tile_px: side of the tiles; models with a fixed input size get them resized on the device.
        dtype: dtype of the stored embeddings, ``float16`` or ``float32``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        precision: ``auto`` (``fp32`` on a CPU, the preset's on CUDA), ``fp32``, ``bf16`` or ``fp16``.
        compile: compile the model with ``torch.compile``; does nothing on a CPU.
        allow_remote_code: let a ``transformers:`` model at a pinned commit run its authors' code. No preset needs it.
        mean: of the red, green and blue that own weights were trained with, from 0 to 1; by default the name's.
        std: the same, of the spread.

    Raises:
        BackboneError: unknown name, pooling or precision; weights absent, unreadable, or of another shape; a mean or
            std for a preset, or one without the other.

    Example:
        >>> backbone = load_backbone()
        >>> backbone.embed(np.zeros((2, 224, 224, 3), dtype=np.uint8)).shape
        (2, 1280)
    """
    if pooling not in POOLINGS or dtype not in ("float16", "float32"):
        raise BackboneError(
            f"got pooling {pooling!r}, dtype {dtype!r} → expected one of {POOLINGS}, float16 or float32"
        )
    chosen = choose_device(device)
    preset = find_preset(name)
    if preset is not None:
        pooling = preset.pooling if pooling == "model" else pooling
        precision = preset.precision if precision == "auto" and chosen.type == "cuda" else precision
        model, revision, note = _load_preset(preset, weights)
        transform = TransformRecipe(preset.input_px or tile_px, preset.interpolation, preset.mean, preset.std)
        name, architecture = preset.name, preset.architecture
    elif name.startswith(PREFIX):
        model, revision, transform = _load_transformers(name, weights, allow_remote_code)
        architecture, note = name, ""
    else:
        model, revision, note = _load_timm(name, weights)
        transform, architecture = own_transform(model, tile_px), name
    transform, source = choose_statistics(transform, mean, std, name, weights, preset is not None)
    choose_precision(precision, chosen)
    # what takes tiles of any size has as many features for each
    dim = _probe_dim(model, pooling, min(transform.input_px, _PROBE_PX))
    recipe = FeatureRecipe(name, architecture, revision, hash_state(model), pooling, transform, dim, dtype)
    backbone = Backbone(model, recipe, chosen, precision, compile)
    if weights is not None:
        backbone.notes = tuple(filter(None, (note, f"weights {weights}: {describe_transform(transform, source)}")))
    return backbone


def choose_precision(precision: str, device: torch.device) -> str:
    """``auto`` is ``bf16`` on CUDA and ``fp32`` elsewhere.

    Raises:
        BackboneError: no such precision.
    """
    if precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    if precision not in PRECISIONS:
        raise BackboneError(f"got precision {precision!r} → expected auto, {', '.join(PRECISIONS)} → correct it")
    return precision


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


def _load_preset(preset: Preset, weights: str | Path | None) -> tuple[nn.Module, str, str]:
    """The preset's model, the revision of its weights, and a word on which part of a file they are."""
    file = fetch(preset) if preset.hub_id and weights is None else None
    model = create_architecture(preset)
    if weights is not None:
        return model, "file", load_own(model, Path(weights), preset.layout, preset.ignored)
    if file is None:
        state = read_wheel_weights(model.state_dict())
    else:
        state = adapt_state(read_weights(file), model, preset.layout, preset.ignored)
    load_state(model, state, preset.source, preset.ignored)
    # an unpinned preset still names the commit that it got: the cache keeps files under it
    return model, preset.revision if file is None or preset.pinned else file.parent.name, ""


def _load_timm(name: str, weights: str | Path | None) -> tuple[nn.Module, str, str]:
    """Any model of timm, the revision of its weights, and a word on which part of a file they are."""
    model = _create_model(name, pretrained=weights is None)
    if weights is None:
        return model, _revision(model), ""
    return model, "file", load_own(model, Path(weights))


def _load_transformers(
    name: str, weights: str | Path | None, allow_remote_code: bool
) -> tuple[nn.Module, str, TransformRecipe]:
    if weights is not None:
        raise BackboneError(f"got weights {weights} for {name!r} → a folder holds them → give {PREFIX}FOLDER instead")
    return load_remote(name, allow_remote_code)


def _create_model(name: str, pretrained: bool) -> nn.Module:
    import timm

    if not name.startswith(("hf-hub:", "local-dir:")) and name.split(".")[0] not in timm.list_models():
        near = dict.fromkeys(get_close_matches(name.lower(), PRESETS, n=3, cutoff=0.3))
        near |= dict.fromkeys(get_close_matches(name.lower(), timm.list_models(), n=3))
        meant = f"did you mean {', '.join(near)}? " if near else ""
        raise BackboneError(
            f"got backbone {name!r} → neither a preset nor a name that timm knows → {meant}mil models list shows the "
            f"presets; hf-hub:owner/model and local-dir:folder work too"
        )
    try:
        with offline_if_unreachable() if pretrained else nullcontext():
            model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise BackboneError(
            f"got no weights for backbone {name!r} ({type(error).__name__}: "
            f"{str(error).splitlines()[0][:200]}) → they must be "
            f"downloaded or given → fetch them where there is a network (HF_HOME holds the cache), or "
            f"pass --weights FILE"
        ) from error
    return model


def _revision(model: nn.Module) -> str:
    config = dict(getattr(model, "pretrained_cfg", {}))
    return str(config.get("hf_hub_id") or config.get("url") or config.get("tag") or "unknown")


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
