"""Parameter groups, and the learning rate over the steps."""

import numpy as np
import pytest
import torch
from torch import nn

from aggregators import create_aggregator, list_aggregators
from mil.config import OptimizerConfig, SchedulerConfig
from mil.optim import create_optimizer, learning_rate, parameter_groups, set_learning_rate


@pytest.mark.parametrize("head", list_aggregators())
def test_biases_and_norms_do_not_decay_and_everything_is_trained_once(head: str) -> None:
    model = create_aggregator(head, in_dim=16, n_classes=2, input_norm="layer")
    groups = parameter_groups(model, 0.1)
    decay_of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay_of) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.LayerNorm) or name.endswith("bias"):
                assert decay_of[id(parameter)] == 0.0
            elif isinstance(module, nn.Linear):
                assert decay_of[id(parameter)] == 0.1


def test_a_frozen_parameter_is_left_out() -> None:
    model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    assert [len(group["params"]) for group in parameter_groups(model, 0.1)] == [1]


# SGD adds the decay to the gradient, so Nesterov's momentum applies to it too: 1 - 0.1 * 0.5 * 1.9
@pytest.mark.parametrize(("name", "kept"), [("adamw", 0.95), ("sgd", 0.905)])
def test_decay_moves_weights_but_not_biases(name: str, kept: float) -> None:
    model = nn.Linear(2, 2)
    nn.init.ones_(model.bias)
    before = model.weight.detach().clone()
    optimizer = create_optimizer(model, OptimizerConfig(name=name, lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before * kept)
    assert model.bias.tolist() == [1.0, 1.0]


def test_the_cosine_warms_up_peaks_and_ends_near_zero() -> None:
    config = SchedulerConfig(warmup_fraction=0.1)
    rates = np.array([learning_rate(2.0, config, step, 100) for step in range(100)])
    np.testing.assert_allclose(rates[:10], np.linspace(0.2, 2.0, 10))
    assert rates.argmax() in (9, 10)
    assert (np.diff(rates[10:]) < 0).all()
    assert 0 < rates[-1] < 0.01
    assert rates[55] == pytest.approx(1.0)


def test_the_cosine_is_torchs() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    for step in range(20):
        assert learning_rate(0.3, SchedulerConfig(warmup_fraction=0.0), step, 20) == pytest.approx(
            scheduler.get_last_lr()[0]
        )
        optimizer.step()
        scheduler.step()


def test_constant_stays_at_the_peak_after_warm_up() -> None:
    config = SchedulerConfig("constant", 0.5)
    assert [learning_rate(1.0, config, step, 4) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]


def test_every_group_gets_the_rate() -> None:
    optimizer = create_optimizer(nn.Linear(2, 2), OptimizerConfig())
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
