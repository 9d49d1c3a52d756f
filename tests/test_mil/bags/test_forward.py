"""Evaluation: all instances, whatever the packs."""

import numpy as np
import pytest
import torch

from aggregators import create_aggregator
from mil.bags.bags import Bags
from mil.bags.devices import resolve_device
from mil.bags.forward import bag_logits, forward_packs
from mil.errors import BagError, ConfigError
from tests.test_mil.small import DIM, make_features

CPU = torch.device("cpu")


def _heads() -> list[torch.nn.Module]:
    torch.manual_seed(0)
    return [create_aggregator("abmil", in_dim=DIM, n_classes=2, embed_dim=8, attention_dim=4) for _ in range(2)]


def test_every_bag_is_seen_whole_and_packing_changes_nothing() -> None:
    matrices = make_features(9, np.arange(9) % 2)
    bags = Bags([f"s{i}" for i in range(9)], matrices)
    heads, order = _heads(), np.array([8, 2, 5, 1])
    logits = bag_logits(heads, bags, order, CPU)
    assert logits.shape == (2, 4, 2)
    for head, row in zip(heads, logits, strict=True):
        alone = torch.cat([head.eval()(torch.from_numpy(matrices[bag])).logits for bag in order]).detach()
        torch.testing.assert_close(row, alone, rtol=1e-5, atol=1e-6)
    for bound in (1, 10):
        packs = [outputs[0].logits for _, outputs in forward_packs(heads, bags, order, CPU, bound)]
        torch.testing.assert_close(torch.cat(packs), logits[0], rtol=1e-5, atol=1e-6)


def test_heads_are_put_into_evaluation_mode() -> None:
    bags = Bags([f"s{i}" for i in range(9)], make_features(9, np.arange(9) % 2))
    heads = [head.train() for head in _heads()]
    first, second = (bag_logits(heads, bags, np.arange(9), CPU) for _ in range(2))
    assert torch.equal(first, second)


def test_predictions_that_are_not_finite_name_the_slide() -> None:
    matrices = make_features(4, np.arange(4) % 2)
    matrices[2][0, 0] = np.nan
    with pytest.raises(BagError, match="'s2' →"):
        bag_logits(_heads(), Bags([f"s{i}" for i in range(4)], matrices), np.arange(4), CPU)


def test_a_device_that_is_not_there_is_an_error() -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ConfigError, match="cuda:99"):
        resolve_device("cuda:99")
