"""Who takes part in a comparison: a name, and how a curve is made from (task, learning rate, seed)."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import our_recipe
from benchmarks.our_recipe import Recipe
from benchmarks.quality_curve import Contestant, Curve, Task, follow

Trainer = Callable[[Task, float, int], Curve]


@dataclass(frozen=True)
class Entrant:
    """One way to train.

    Attributes:
        name: names the rows.
        ours: else a rival's.
        train: takes a task, a learning rate and a seed.
    """

    name: str
    ours: bool
    train: Trainer


def rival_entrant(name: str, create: Callable[[], Contestant], epochs: int) -> Entrant:
    """Somebody else's, driven epoch by epoch."""
    return Entrant(name, False, lambda task, lr, seed: follow(create(), task, lr, seed, epochs))


def our_entrant(recipe: Recipe, epochs: int) -> Entrant:
    """`mil.training.loop` with the settings of a recipe."""
    return Entrant(recipe.name, True, lambda task, lr, seed: our_recipe.train(recipe, task, lr, seed, epochs))
