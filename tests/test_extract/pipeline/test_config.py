"""What an extraction is told: every keyword reaches its part, and what does not suit is refused."""

from dataclasses import fields
from pathlib import Path

import pytest

from extract.errors import RecipeError
from extract.pipeline.config import (
    BackboneConfig,
    ComputeConfig,
    EntryConfig,
    ExtractionConfig,
    ExtractionSettings,
    ReadingConfig,
    SlideSelection,
)
from extract.reading.isolation import ReaderLimits
from extract.store import AugmentRecipe, TileRecipe

PARTS = {
    "slides": SlideSelection,
    "backbone": BackboneConfig,
    "compute": ComputeConfig,
    "entries": EntryConfig,
    "reading": ReadingConfig,
}

NAMED = {"slides", "backbones", "entry"}
"""Fields that are arguments of their own."""

CHANGED = {
    "table": "slides.csv",
    "masks": "masks",
    "images": "img_{}.png",
    "shard_text": "1/2",
    "weights": Path("w.safetensors"),
    "pooling": "avg",
    "dtype": "float32",
    "allow_remote_code": True,
    "mean": (0.7, 0.5, 0.6),
    "std": (0.2, 0.25, 0.3),
    "device": "cpu",
    "batch_size": 8,
    "runtime": "torch",
    "precision": "fp32",
    "compile_model": True,
    "views": 2,
    "augment": AugmentRecipe("flip"),
    "context_mpp": (2.0,),
    "default_mpp": 0.25,
    "reader": "openslide",
    "isolation": False,
    "limits": ReaderLimits(cut_s=1.0),
    "max_invalid": 0.5,
    "redo": ("a",),
}
"""Another value than the default of every field of a part."""


def of(backbone: object = "resnet18", entry: str | None = None, **settings: object) -> ExtractionConfig:
    return ExtractionConfig.of("slides/", backbone, entry, None, **settings)  # type: ignore[arg-type]


def test_keywords_are_the_fields_of_the_parts_and_of_the_tile_recipe():
    own = {each.name for part in PARTS.values() for each in fields(part)} - NAMED
    assert own == set(CHANGED)
    assert set(ExtractionSettings.__annotations__) == own | {each.name for each in fields(TileRecipe)} | {"format"}


@pytest.mark.parametrize("name", CHANGED)
def test_a_keyword_changes_its_field_and_no_other(name: str):
    plain, changed = of(), of(**{name: CHANGED[name]})
    values = {
        each.name: [getattr(getattr(config, part), each.name) for config in (plain, changed)]
        for part, kind in PARTS.items()
        for each in fields(kind)
    }
    assert {field for field, (before, after) in values.items() if before != after} == {name}
    assert values[name][1] == CHANGED[name]
    assert (plain.recipe, plain.format) == (changed.recipe, changed.format)


def test_none_stands_for_the_default_but_for_the_scale():
    assert of(**dict.fromkeys(CHANGED)) == of() == of(format=None)
    assert of(mpp=None).recipe == TileRecipe(mpp=None)
    assert of(format="h5").format == "h5"


def test_one_path_and_one_backbone_are_lists_of_one():
    assert of() == ExtractionConfig.of(["slides/"], ["resnet18"], None, None)


def test_a_keyword_that_there_is_not_is_refused():
    with pytest.raises(TypeError, match="tile_size"):
        of(tile_size=224)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": ()}, "got no backbone"),
        ({"backbone": ("a", "b"), "entry": "x"}, "got 2 backbones with one --as, --weights"),
        ({"backbone": ("a", "b"), "weights": "w.pth"}, "got 2 backbones with one --as, --weights"),
        ({"backbone": ("a", "b"), "mean": (0.5, 0.5, 0.5)}, "--mean or --std"),
        ({"context_mpp": (0.5,)}, "got a context of 0.5 µm/px → expected µm per pixel, coarser than the tiles' 0.5"),
        ({"context_mpp": (float("nan"),), "mpp": None}, "got a context of nan µm/px"),
        ({"default_mpp": 0.0}, "got a default mpp of 0.0"),
        ({"default_mpp": float("inf")}, "got a default mpp of inf"),
        ({"overlap_px": -1}, "got overlap -1"),
    ],
)
def test_what_does_not_suit_is_refused(settings: dict[str, object], message: str):
    with pytest.raises(RecipeError) as refusal:
        of(**settings)
    assert message in str(refusal.value)


def test_a_backbone_is_loaded_as_told(monkeypatch: pytest.MonkeyPatch):
    told: dict[str, object] = {}
    monkeypatch.setattr("extract.backbones.backbone.load_backbone", lambda name, **keywords: told.update(keywords))
    names = "weights", "pooling", "dtype", "device", "precision", "allow_remote_code", "mean", "std"
    of(**{name: CHANGED[name] for name in (*names, "compile_model")}, tile_px=96).load("resnet18")
    assert told == {name: CHANGED[name] for name in names} | {"compile": True, "tile_px": 96}
