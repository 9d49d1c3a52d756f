"""What the flags of mil extract and mil plan say to the extraction, and what they refuse."""

import pytest
import typer

from extract.store import TissueRecipe
from mil.cli.slides.flags import ExtractionFlags


def test_a_tissue_threshold_is_both_limits_of_otsus():
    usual, given = ExtractionFlags(slides=["a"]), ExtractionFlags(slides=["a"], tissue_threshold=33)
    assert usual.tile_recipe.tissue == TissueRecipe()
    recipe = given.tile_recipe.tissue
    assert (recipe.threshold_low, recipe.threshold_high) == (33, 33)


@pytest.mark.parametrize("method", ["none", "mask"])
def test_a_threshold_without_a_colour_to_compare_is_refused(method: str):
    with pytest.raises(typer.BadParameter, match="--tissue-threshold"):
        ExtractionFlags(slides=["a"], tissue=method, tissue_threshold=33).check()  # type: ignore[arg-type]
