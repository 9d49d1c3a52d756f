"""Fingerprints: every field of every recipe counts, and a difference is named."""

import json
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from extract.errors import RecipeError, RecipeMismatchError
from extract.store import (
    Execution,
    FeatureRecipe,
    SlideFingerprint,
    TileRecipe,
    TissueRecipe,
    difference,
    fingerprint,
    from_dict,
    to_dict,
)
from extract.store.core.fingerprint import canonical_json, sha256_of
from extract.store.core.recipes import AugmentRecipe, PenRecipe, QualityRecipe
from tests.test_extract.small import EXECUTION, feature_recipe

AUGMENTED = feature_recipe(view="view-0", augment=AugmentRecipe())
RECIPES = [TileRecipe(), feature_recipe(), AUGMENTED, EXECUTION, SlideFingerprint(10, "ab", ("1:cd",))]


def leaves(recipe: Any, prefix: str = "") -> list[str]:
    """Dotted names of all fields of a dataclass tree."""
    names: list[str] = []
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        names += leaves(value, f"{prefix}{field.name}.") if is_dataclass(value) else [f"{prefix}{field.name}"]
    return names


def other_value(value: Any) -> Any:
    """A value of the same kind that is not equal."""
    if value is None:
        return 0.123
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, tuple):
        return (*value[:-1], other_value(value[-1]))
    if isinstance(value, dict):
        return {**value, "new": "1"}
    raise AssertionError(f"teach this test what differs from {value!r}")


def flip(recipe: Any, dotted: str, value: Any) -> Any:
    """The recipe with one field of its tree set, even to what its own checks refuse."""
    head, _, rest = dotted.partition(".")
    new = flip(getattr(recipe, head), rest, value) if rest else value
    copy = replace(recipe)
    object.__setattr__(copy, head, new)
    return copy


def read(recipe: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        recipe = getattr(recipe, name)
    return recipe


CASES = [(recipe, dotted) for recipe in RECIPES for dotted in leaves(recipe)]


@pytest.mark.parametrize(("recipe", "dotted"), CASES, ids=[f"{type(r).__name__}.{d}" for r, d in CASES])
def test_every_field_changes_the_fingerprint_and_is_named(recipe: Any, dotted: str):
    changed = flip(recipe, dotted, other_value(read(recipe, dotted)))
    assert fingerprint(changed) != fingerprint(recipe)
    lines = difference(recipe, changed)
    assert len(lines) == 1
    named = lines[0].split(":")[0]
    assert named == dotted or named.startswith(f"{dotted}.")
    assert " → " in lines[0]
    # None is a value too
    if read(recipe, dotted) is not None:
        assert fingerprint(flip(recipe, dotted, None)) != fingerprint(recipe)
        assert len(difference(recipe, flip(recipe, dotted, None))) >= 1


def test_the_walk_over_the_fields_sees_nested_recipes():
    assert {"mpp", "tissue.method", "tissue.pen.red_range", "quality.blur_mpp"} <= set(leaves(TileRecipe()))
    assert {"transform.mean", "weights_sha256", "augment"} <= set(leaves(feature_recipe()))
    assert {"augment.policy", "augment.strength", "augment.seed"} <= set(leaves(AUGMENTED))


@pytest.mark.parametrize(
    "recipe", [TileRecipe(), TileRecipe(mpp=None, edge="drop"), feature_recipe(), AUGMENTED, TissueRecipe()]
)
def test_a_recipe_comes_back_from_json(recipe: Any):
    plain = json.loads(json.dumps(to_dict(recipe)))
    back = from_dict(type(recipe), plain)
    assert back == recipe
    assert fingerprint(back) == fingerprint(recipe) == fingerprint(plain)
    assert difference(recipe, plain) == []


def test_a_missing_or_unknown_field_is_refused_by_name():
    plain = to_dict(TileRecipe())
    with pytest.raises(RecipeMismatchError, match="stain"):
        from_dict(TileRecipe, {**plain, "stain": "x"})
    del plain["edge"]
    with pytest.raises(RecipeMismatchError, match="edge"):
        from_dict(TileRecipe, plain)
    nested = to_dict(TileRecipe())
    nested["tissue"]["colour"] = 1
    with pytest.raises(RecipeMismatchError, match="colour"):
        from_dict(TileRecipe, nested)


def test_the_hash_does_not_depend_on_the_order_of_fields():
    plain = to_dict(feature_recipe())
    assert fingerprint(dict(reversed(plain.items()))) == fingerprint(plain)


def test_canonical_json_is_compact_sorted_and_keeps_floats_and_letters():
    assert canonical_json({"b": 0.1, "a": [1, "é"]}) == '{"a":[1,"é"],"b":0.1}'
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"a": float("nan")})


def test_recipes_and_executions_are_pinned():
    """A changed value here means that stores made before are refused: change FORMAT or explain it in the changelog."""
    assert fingerprint(TileRecipe())[:16] == "2a9fee0fa1183c17"
    assert fingerprint(feature_recipe())[:16] == "9c1a18b5637a4fe3"


def test_equal_recipes_have_equal_fingerprints():
    assert TileRecipe(mpp=1) == TileRecipe(mpp=1.0)
    assert fingerprint(TileRecipe(mpp=1)) == fingerprint(TileRecipe(mpp=1.0))


@pytest.mark.parametrize(
    "values",
    [
        {"edge": "shfit"},
        {"overlap_px": 224},
        {"overlap_px": -3},
        {"tile_px": 0},
        {"mpp": -0.5},
        {"mpp": float("nan")},
        {"min_tissue_fraction": 1.5},
        {"resampling": "lanczos"},
        {"gap_px": -1},
        {"gap_px": 10, "overlap_px": 10},
        {"jitter_px": 224},
        {"jitter_px": 200, "overlap_px": 24},
        {"jitter_px": -1},
        {"jitter_seed": -1},
    ],
    ids=str,
)
def test_a_senseless_tile_recipe_is_refused(values: dict[str, Any]):
    with pytest.raises(RecipeError, match=r"got .* → expected .* → "):
        TileRecipe(**values)
    with pytest.raises(RecipeError, match="othsu"):
        TissueRecipe(method="othsu")


@pytest.mark.parametrize(
    ("recipe", "values"),
    [
        (TissueRecipe, {"pen_margin_px": -1}),
        (PenRecipe, {"cool_tilt": 1.5}),
        (PenRecipe, {"black_value": 256}),
        (QualityRecipe, {"sampling_px": 0}),
        (QualityRecipe, {"blur_mpp": 0}),
        (QualityRecipe, {"pen_fraction": 2}),
    ],
    ids=str,
)
def test_a_senseless_nested_recipe_is_refused(recipe: Any, values: dict[str, Any]):
    with pytest.raises(RecipeError, match=r"got .* → expected .* → "):
        recipe(**values)


@pytest.mark.parametrize("method", ["default", "saturation", "mask", "none"])
def test_the_tissue_methods(method: str):
    assert TissueRecipe(method=method).method == method


def test_a_gap_allows_more_jitter():
    assert TileRecipe(gap_px=100, jitter_px=323).jitter_px == 323


@pytest.mark.parametrize(
    "values",
    [
        {"policy": "stain"},
        {"strength": -0.1},
        {"strength": 1.1},
        {"strength": float("nan")},
        {"seed": -1},
        {"revision": 0},
    ],
    ids=str,
)
def test_a_senseless_augment_recipe_is_refused(values: dict[str, Any]):
    with pytest.raises(RecipeError, match=r"got augmentation .* → expected .* → "):
        AugmentRecipe(**values)


def test_recipes_are_frozen():
    with pytest.raises(AttributeError):
        TileRecipe().mpp = 1.0  # type: ignore[misc]
    assert hash(TileRecipe()) == hash(TileRecipe())
    assert isinstance(feature_recipe(), FeatureRecipe)
    assert isinstance(EXECUTION, Execution)


# ---------------------------------------------------------------- files and arrays


@pytest.mark.parametrize("size", [0, 1, 1000, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 5 << 20])
def test_a_slide_fingerprint_sees_head_middle_tail_and_size(tmp_path: Path, size: int, rng: np.random.Generator):
    file = tmp_path / "slide"
    content = bytearray(rng.bytes(size))
    file.write_bytes(content)
    first = SlideFingerprint.of(file)
    assert first.size_bytes == size
    assert SlideFingerprint.of(file) == first
    for place in {0, size // 2, size - 1} if size else ():
        changed = bytearray(content)
        changed[place] ^= 1
        file.write_bytes(changed)
        assert SlideFingerprint.of(file) != first
    file.write_bytes(content + b"\0")
    assert SlideFingerprint.of(file) != first


def test_an_arrays_hash_is_that_of_its_bytes_in_c_order():
    import hashlib

    array = np.arange(12, dtype=np.int32).reshape(3, 4)
    assert sha256_of(array) == hashlib.sha256(array.tobytes()).hexdigest()
    assert sha256_of(array) != sha256_of(array.T.copy())
