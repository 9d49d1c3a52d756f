"""Verify a preset on this machine: its weights load, give the declared features, and agree on the normalisation."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from extract.backbones.backbone import Backbone, load_backbone
from extract.backbones.hub import find_cached
from extract.backbones.presets import require_preset

_TOLERANCE = 5e-4


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        name: of the preset.
        revision: commit of the weights, or ``file``.
        weights_sha256: of all tensors under timm's names, as recorded in a store.
        pooling: the preset's own.
        dim: features of a tile.
        declared_dim: what the preset says.
        finite: whether all features are finite.
        distinct: whether different tiles get different features.
        normalisation: ``agrees``, ``no config beside the weights``, or what differs.
    """

    name: str
    revision: str
    weights_sha256: str
    pooling: str
    dim: int
    declared_dim: int
    finite: bool
    distinct: bool
    normalisation: str

    @property
    def passed(self) -> bool:
        """Whether nothing contradicts the preset."""
        agrees = not self.normalisation.startswith("differs")
        return self.dim == self.declared_dim and self.finite and self.distinct and agrees


def verify_backbone(name: str, weights: str | Path | None = None, device: str = "auto") -> Verification:
    """Load a preset, embed three synthetic tiles, and compare with what is declared.

    Args:
        name: of a preset.
        weights: local file instead of the hub's.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        BackboneError: no such preset, or its weights cannot be had or do not fit.
    """
    preset = require_preset(name)
    backbone = load_backbone(preset.name, weights, tile_px=preset.tile_px, device=device)
    features = backbone.embed(synthetic_tiles(preset.tile_px))
    file = Path(weights) if weights is not None else find_cached(preset) if preset.hub_id else None
    return Verification(
        preset.name,
        backbone.recipe.revision,
        backbone.recipe.weights_sha256,
        backbone.recipe.pooling,
        features.shape[1],
        preset.dim,
        bool(np.isfinite(features).all()),
        len(np.unique(features, axis=0)) == len(features),
        _compare_normalisation(backbone, file),
    )


def synthetic_tiles(tile_px: int) -> np.ndarray:
    """Three fixed tiles, uint8 [3, tile_px, tile_px, 3]: pale, pink with grain, and a ramp of purple."""
    grain = np.random.default_rng(0).integers(-30, 31, (tile_px, tile_px, 1))
    ramp = np.linspace(60, 200, tile_px).astype(np.int64)[None, :, None]
    pale = np.full((tile_px, tile_px, 3), 240)
    pink = np.array([210, 140, 180]) + grain
    purple = np.array([30, -20, 50]) + np.broadcast_to(ramp, (tile_px, tile_px, 1))
    return np.stack([pale, pink, purple]).clip(0, 255).astype(np.uint8)


def _compare_normalisation(backbone: Backbone, file: Path | None) -> str:
    """The preset's mean and std against the config that lies beside the weights."""
    stated = None if file is None else _stated_normalisation(file.parent)
    if stated is None:
        return "no config beside the weights"
    transform = backbone.recipe.transform
    for what, ours, theirs in zip(("mean", "std"), (transform.mean, transform.std), stated, strict=True):
        if not np.allclose(ours, theirs, atol=_TOLERANCE):
            return f"differs: the preset's {what} is {list(ours)}, the config's {list(theirs)}"
    return "agrees"


def _stated_normalisation(folder: Path) -> tuple[Any, Any] | None:
    """Mean and std of timm's ``config.json`` or of transformers' ``preprocessor_config.json``."""
    for name, keys in (("preprocessor_config.json", ("image_mean", "image_std")), ("config.json", ("mean", "std"))):
        config = _read_json(folder / name)
        config = config.get("pretrained_cfg") or config
        mean, std = (config.get(key) for key in keys)
        if all(isinstance(value, list) and len(value) == 3 for value in (mean, std)):
            return mean, std
    return None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
