"""What a head will cost is told before it is trained, and the cheapest is trained first."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch

from mil.bags.bags import Bags
from mil.config.compose import compose_config
from mil.experiments.cost import HeadCost, cheapest_first, measure_cost


def bags(n: int = 12, instances: int = 40, dim: int = 16) -> Bags:
    generator = np.random.default_rng(0)
    return Bags([f"s{i}" for i in range(n)], [generator.normal(size=(instances, dim)).astype("f4") for _ in range(n)])


def cost(head: str, instances: int = 40, **changes: int) -> HeadCost:
    config = compose_config([f"head={head}", "device=cpu"])
    return measure_cost(head, "tiny", replace(config, **changes), bags(instances=instances), 3, 15)


def test_every_head_is_measured_and_dearer_ones_cost_more() -> None:
    mean, transformer = cost("mean", 300), cost("transformer", 300)
    assert 0 < mean.seconds < transformer.seconds
    assert mean.n_parameters == 16 * 3 + 3
    assert cost("transmil").seconds > 0


def test_epochs_and_replicas_multiply_and_torchs_generator_is_left_alone() -> None:
    state = torch.random.get_rng_state()
    one, ten = cost("mean", epochs=1), cost("mean", epochs=100)
    assert 20 < ten.seconds / one.seconds < 500
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_head_that_cannot_be_built_has_no_cost_and_comes_last() -> None:
    config = compose_config(["head=abmil", "device=cpu"])
    broken = replace(config, head=replace(config.head, keywords={**config.head.keywords, "embed_dim": 10**9}))
    assert math.isnan(measure_cost("abmil", "tiny", broken, bags(), 3, 15).seconds)
    cells = [SimpleNamespace(name=name) for name in ("mean", "broken", "dear", "cheap")]
    prices = dict(zip(map(id, cells), (9.0, math.nan, 5.0, 1.0), strict=True))

    class Prices(dict[object, HeadCost]):
        def __getitem__(self, cell: object) -> HeadCost:
            return HeadCost("", "", 1, prices[id(cell)])

    assert [each.name for each in cheapest_first(cells, Prices())] == ["mean", "cheap", "dear", "broken"]  # type: ignore[type-var]
