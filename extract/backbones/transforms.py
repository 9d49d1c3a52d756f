"""How tiles become a model's input: size, interpolation, mean and std."""

from torch import nn

from extract.store import TransformRecipe


def own_transform(model: nn.Module, tile_px: int) -> TransformRecipe:
    """The model's own normalisation; the tile's size unless the model accepts one size only."""
    import timm.data

    config = timm.data.resolve_model_data_config(model)
    fixed = getattr(model, "pretrained_cfg", {}).get("fixed_input_size") or hasattr(model, "pos_embed")
    input_px = int(config["input_size"][-1]) if fixed else tile_px
    interpolation = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
    return TransformRecipe(input_px, interpolation, tuple(config["mean"]), tuple(config["std"]))


def describe_transform(transform: TransformRecipe) -> str:
    """A transform in words."""
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (transform.mean, transform.std))
    return f"input {transform.input_px} px, {transform.interpolation}, mean ({mean}), std ({std})"
