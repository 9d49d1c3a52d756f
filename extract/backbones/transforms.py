"""How tiles become a model's input: size, interpolation, mean and std."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from extract.errors import BackboneError
from extract.store import TransformRecipe

_CONFIGS = (
    ("config.json", "pretrained_cfg", ("mean", "std")),
    ("preprocessor_config.json", "", ("image_mean", "image_std")),
)
"""Files beside downloaded weights, and where their statistics stand in them."""


def own_transform(model: nn.Module, tile_px: int) -> TransformRecipe:
    """The model's own normalisation; the tile's size unless the model accepts one size only."""
    import timm.data

    config = timm.data.resolve_model_data_config(model)
    fixed = getattr(model, "pretrained_cfg", {}).get("fixed_input_size") or hasattr(model, "pos_embed")
    input_px = int(config["input_size"][-1]) if fixed else tile_px
    interpolation = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
    return TransformRecipe(input_px, interpolation, tuple(config["mean"]), tuple(config["std"]))


def choose_statistics(
    transform: TransformRecipe,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    name: str,
    weights: str | Path | None,
    preset: bool,
) -> tuple[TransformRecipe, str]:
    """A transform with the statistics that belong to the weights, and where these come from, in words.

    Those that are given; else those of a file beside own weights; else those of the backbone's name.

    Raises:
        BackboneError: as in `with_statistics`.
    """
    if mean is not None or std is not None:
        owned = name if preset or weights is None else None
        return with_statistics(transform, mean, std, owned), "as given"
    if preset or weights is None:
        return transform, "as its authors trained it"
    found, file = beside_weights(transform, weights)
    return found, f"of {file} beside them" if file else "of timm's name; --mean and --std give others"


def with_statistics(
    transform: TransformRecipe, mean: Sequence[float] | None, std: Sequence[float] | None, owned: str | None
) -> TransformRecipe:
    """A transform with the mean and std that own weights were trained with.

    Args:
        transform: gives size and interpolation.
        mean: of red, green and blue, from 0 to 1.
        std: the same, of the spread.
        owned: name of a backbone whose statistics are its authors'; None for own weights.

    Raises:
        BackboneError: the statistics are another's to choose, or they are not three sensible numbers each.
    """
    if owned is not None:
        raise BackboneError(
            f"got a mean or std for {owned!r} → it is normalised as its authors trained it → leave --mean and --std "
            f"out; they belong to own weights of a timm name (--weights)"
        )
    if mean is None or std is None or len(mean) != 3 or len(std) != 3:
        raise BackboneError(f"got mean {mean}, std {std} → expected three numbers each, R,G,B → give both")
    if not (all(0 <= value <= 1 for value in mean) and all(0 < value <= 1 for value in std)):
        raise BackboneError(
            f"got mean {tuple(mean)}, std {tuple(std)} → expected numbers from 0 to 1, std above 0 → divide those of "
            f"pixels from 0 to 255 by 255"
        )
    of_mean, of_std = ((float(r), float(g), float(b)) for r, g, b in (mean, std))
    return replace(transform, mean=of_mean, std=of_std)


def beside_weights(transform: TransformRecipe, weights: str | Path) -> tuple[TransformRecipe, str]:
    """A transform with the statistics that a downloaded hub folder says beside the weights, and the file that does.

    timm's ``config.json`` (``pretrained_cfg``) and the ``preprocessor_config.json`` of transformers are known; without
    one, or where it says no statistics, the transform is as it was and the name empty.

    Raises:
        BackboneError: they are not three sensible numbers each.
    """
    for name, section, keys in _CONFIGS:
        path = Path(weights).parent / name
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = content.get(section, content) if section else content
            mean, std = (found[key] for key in keys)
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
            continue
        return with_statistics(transform, mean, std, None), name
    return transform, ""


def describe_transform(transform: TransformRecipe, source: str) -> str:
    """A transform in words, and where its statistics come from."""
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (transform.mean, transform.std))
    return f"input {transform.input_px} px, {transform.interpolation}, mean ({mean}), std ({std}) {source}"
