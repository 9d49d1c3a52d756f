"""How tiles become a model's input: size, interpolation, mean and std."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from extract.errors import BackboneError
from extract.store import TransformRecipe


def own_transform(model: nn.Module, tile_px: int) -> TransformRecipe:
    """The model's own normalisation; the tile's size unless the model accepts one size only."""
    import timm.data

    config = timm.data.resolve_model_data_config(model)
    fixed = getattr(model, "pretrained_cfg", {}).get("fixed_input_size") or hasattr(model, "pos_embed")
    input_px = int(config["input_size"][-1]) if fixed else tile_px
    interpolation = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
    return TransformRecipe(input_px, interpolation, tuple(config["mean"]), tuple(config["std"]))


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


def describe_transform(transform: TransformRecipe, given: bool, preset: bool) -> str:
    """A transform in words, and whether its statistics were given or are those of timm's name."""
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (transform.mean, transform.std))
    named = "as the preset's authors trained it" if preset else "of timm's name; --mean and --std give others"
    where = "as given" if given else named
    return f"input {transform.input_px} px, {transform.interpolation}, mean ({mean}), std ({std}) {where}"
