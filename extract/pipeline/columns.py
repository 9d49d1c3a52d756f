"""Which features of a slide are to be made: backbones, entries, views, contexts."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from extract.backbones.backbone import Backbone
from extract.errors import RecipeError
from extract.pipeline.jobs import Column
from extract.store import AugmentRecipe, FeatureRecipe, TileRecipe


def all_columns(
    backbones: Sequence[Backbone],
    entry: str | None,
    views: int,
    augment: AugmentRecipe,
    context_mpp: Sequence[float],
) -> list[Column]:
    """The columns of every backbone.

    Raises:
        RecipeError: two of them would be one entry.
    """
    columns = [column for each in backbones for column in make_columns(each, entry, views, augment, context_mpp)]
    names = [column.entry for column in columns]
    if len(set(names)) < len(names):
        raise RecipeError(f"got the entries {names} → expected each once → name each backbone and --context-mpp once")
    return columns


def check_entries(backbones: Sequence[str | Backbone], entry: str | None, weights: str | Path | None) -> None:
    if not backbones:
        raise RecipeError("got no backbone → expected at least one → name one")
    if len(backbones) > 1 and (entry is not None or weights is not None):
        raise RecipeError(
            f"got {len(backbones)} backbones with one --as or --weights → these belong to one backbone → run them one "
            f"after the other, or leave these out"
        )


def check_contexts(recipe: TileRecipe, context_mpp: Sequence[float]) -> None:
    """Contexts are coarser than the tiles, whatever the slide; with ``--native`` each slide tells.

    Raises:
        RecipeError: one is not.
    """
    for mpp in context_mpp:
        if not (math.isfinite(mpp) and mpp > (recipe.mpp or 0.0)):
            finest = "" if recipe.mpp is None else f", coarser than the tiles' {recipe.mpp:g}"
            raise RecipeError(
                f"got a context of {mpp:g} µm/px → expected µm per pixel{finest} → use such as --context-mpp "
                f"{4 * (recipe.mpp or 0.5):g}"
            )


def entry_name(backbone: str) -> str:
    """The default entry of a backbone: its name with everything outside ``[a-z0-9._-]`` replaced by ``-``."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in backbone.lower())
    return kept.strip("._-") or "features"


def make_columns(
    backbone: Backbone, entry: str | None, views: int, augment: AugmentRecipe, context_mpp: Sequence[float]
) -> list[Column]:
    """What is computed with one backbone: its tiles as they are, their augmented views, and their surroundings."""
    name = entry or entry_name(backbone.recipe.backbone)
    # a copy, since the run may let it compute by another runtime
    columns = [Column(name, _with_recipe(backbone, backbone.recipe))]
    for view in range(1, views + 1):
        recipe = replace(backbone.recipe, view=f"view-{view}", augment=augment)
        columns.append(Column(f"{name}@view-{view}", _with_recipe(backbone, recipe), view))
    for mpp in context_mpp:
        recipe = replace(backbone.recipe, context_mpp=mpp)
        columns.append(Column(f"{name}@context-{mpp:g}", _with_recipe(backbone, recipe)))
    return columns


def _with_recipe(backbone: Backbone, recipe: FeatureRecipe) -> Backbone:
    """The same loaded weights under another recipe."""
    other = copy.copy(backbone)
    other.recipe = recipe
    return other
