"""Which features of a slide are to be made: backbones, entries, views, contexts."""

import copy
from collections.abc import Sequence
from dataclasses import replace

from extract.backbones.backbone import Backbone
from extract.errors import RecipeError
from extract.pipeline.config import EntryConfig
from extract.pipeline.jobs import Column
from extract.store import FeatureRecipe


def all_columns(backbones: Sequence[Backbone], entries: EntryConfig) -> list[Column]:
    """The columns of every backbone.

    Raises:
        RecipeError: two of them would be one entry.
    """
    columns = [column for each in backbones for column in make_columns(each, entries)]
    names = [column.entry for column in columns]
    if len(set(names)) < len(names):
        raise RecipeError(f"got the entries {names} → expected each once → name each backbone and --context-mpp once")
    return columns


def entry_name(backbone: str) -> str:
    """The default entry of a backbone: its name with everything outside ``[a-z0-9._-]`` replaced by ``-``."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in backbone.lower())
    return kept.strip("._-") or "features"


def make_columns(backbone: Backbone, entries: EntryConfig) -> list[Column]:
    """What is computed with one backbone: its tiles as they are, their augmented views, and their surroundings."""
    name = entries.entry or entry_name(backbone.recipe.backbone)
    # a copy, since the run may let it compute by another runtime
    columns = [Column(name, _with_recipe(backbone, backbone.recipe))]
    for view in range(1, entries.views + 1):
        recipe = replace(backbone.recipe, view=f"view-{view}", augment=entries.augment)
        columns.append(Column(f"{name}@view-{view}", _with_recipe(backbone, recipe), view))
    for mpp in entries.context_mpp:
        recipe = replace(backbone.recipe, context_mpp=mpp)
        columns.append(Column(f"{name}@context-{mpp:g}", _with_recipe(backbone, recipe)))
    return columns


def _with_recipe(backbone: Backbone, recipe: FeatureRecipe) -> Backbone:
    """The same loaded weights under another recipe."""
    other = copy.copy(backbone)
    other.recipe = recipe
    return other
