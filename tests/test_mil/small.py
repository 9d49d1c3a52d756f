"""Small cohorts and a store in memory, for the tests of training."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from extract.store import FeatureRecipe, TileRecipe, TransformRecipe
from mil.cohort.cohort import Attrition, Cohort
from mil.config.compose import compose_config
from mil.config.train import TrainConfig

DIM = 6
FEATURES = FeatureRecipe(
    backbone="tiny",
    architecture="tiny",
    revision="1",
    weights_sha256="0" * 64,
    pooling="avg",
    transform=TransformRecipe(224, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    dim=DIM,
)
FAST = ["head.embed_dim=8", "head.attention_dim=4", "epochs=4", "optimizer.lr=0.01", "device=cpu"]


@dataclass(frozen=True)
class MemorySlide:
    """One slide of a `MemoryStore`."""

    matrices: dict[str, np.ndarray]
    record: dict[str, Any] = field(default_factory=dict)

    def verify_features(self, entry: str) -> None:
        """Memory is trusted."""

    def features(self, entry: str) -> np.ndarray:
        """[n, dim]."""
        return self.matrices[entry]

    def coords(self, entry: str) -> np.ndarray:
        """[n, 2]: one row of tiles."""
        n = len(self.matrices[entry])
        return np.stack([512 * np.arange(n), np.zeros(n)], axis=1).astype(np.int32)


@dataclass
class MemoryStore:
    """What training and inference use of a store."""

    slides: dict[str, np.ndarray]
    recipes: dict[str, FeatureRecipe] = field(default_factory=lambda: {"tiny": FEATURES})
    tile_recipe: TileRecipe = field(default_factory=TileRecipe)
    path: Path = Path("cohort.zarr")

    def entries(self) -> list[str]:
        """Names."""
        return sorted(self.recipes)

    def feature_recipe(self, entry: str) -> FeatureRecipe:
        """Recipe of an entry."""
        return self.recipes[entry]

    def slide_ids(self, entry: str | None = None) -> list[str]:
        """All slides."""
        return sorted(self.slides)

    def n_tiles(self, slide_id: str, entry: str) -> int:
        """Rows of a slide."""
        return len(self.slides[slide_id])

    def __getitem__(self, slide_id: str) -> MemorySlide:
        return MemorySlide(dict.fromkeys(self.recipes, self.slides[slide_id]))


def make_features(n: int, labels: np.ndarray, seed: int = 0) -> list[np.ndarray]:
    """Bags of 3 to 9 instances, of which about half carry their class."""
    rng = np.random.default_rng(seed)
    directions = 4 * np.eye(DIM)
    bags = []
    for label in labels[:n]:
        instances = rng.normal(size=(int(rng.integers(3, 10)), DIM)) + 1
        instances[::2] += directions[label]
        bags.append(instances.astype(np.float16))
    return bags


def make_cohort(n_patients: int = 12, slides_each: int = 2) -> Cohort:
    """Two classes, one per patient."""
    n = n_patients * slides_each
    patients = np.arange(n) // slides_each
    return Cohort(
        slide_ids=tuple(f"slide {index:02d}" for index in range(n)),
        patient_ids=tuple(f"p{patient}" for patient in patients),
        labels=(patients % 2).astype(np.int64),
        class_names=("Luminal A", "triple-negative"),
        target="subtype",
        attrition=Attrition(n_rows=n, n_kept=n),
    )


def make_store(cohort: Cohort, **keywords: Any) -> MemoryStore:
    """A store of the cohort's slides."""
    features = make_features(len(cohort), cohort.labels)
    return MemoryStore(dict(zip(cohort.slide_ids, features, strict=True)), **keywords)


@cache
def fast_config(*overrides: str) -> TrainConfig:
    """A configuration that trains a tiny ABMIL head in a moment; composed once, as Hydra takes a sixth of a second."""
    return compose_config([*FAST, *overrides])
