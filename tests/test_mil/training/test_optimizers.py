"""Optimizers do what their names say, and the learning rate over the steps."""

import numpy as np
import pytest
import torch
from torch import nn

from aggregators import create_aggregator, list_aggregators
from mil.config.options import OPTIMIZERS, SCHEDULERS
from mil.config.sections import OptimizerConfig, SchedulerConfig
from mil.training.optimizers import add_l1_gradient, create_optimizer, parameter_groups, set_learning_rate
from mil.training.schedules import learning_rate

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


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


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))


def _gradient(step: int, parameter: torch.Tensor) -> torch.Tensor:
    return torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))


def _walk(optimizer: torch.optim.Optimizer, model: nn.Module, steps: range) -> list[torch.Tensor]:
    """Take steps with gradients of their own; returns copies of the parameters."""
    for step in steps:
        for parameter in model.parameters():
            parameter.grad = _gradient(step, parameter)
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


# SGD adds the decay to the gradient, so Nesterov's momentum applies to it too: 1 - 0.1 * 0.5 * 1.9
DECOUPLED = dict.fromkeys(("adamw", "lion", "nadam", "radam", "muon", "lookahead_lion"), 0.95)


@pytest.mark.parametrize(("name", "kept"), [*DECOUPLED.items(), ("sgd", 0.905)])
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


@every_optimizer
def test_every_optimizer_goes_on_from_its_saved_state_and_keeps_the_rate(name: str) -> None:
    whole, halves = _model(), _model()
    expected = _walk(create_optimizer(whole, OptimizerConfig(name)), whole, range(13))
    first = create_optimizer(halves, OptimizerConfig(name))
    _walk(first, halves, range(7))
    second = create_optimizer(halves, OptimizerConfig(name))
    second.load_state_dict(first.state_dict())
    for a, b in zip(expected, _walk(second, halves, range(7, 13)), strict=True):
        assert torch.equal(a, b)
    # after loading too, a rate of zero reaches what takes the steps
    set_learning_rate(second, 0.0)
    for a, b in zip(expected, _walk(second, halves, range(13, 17)), strict=True):
        if "lookahead" not in name and name != "ranger":
            assert torch.equal(a, b)


@every_optimizer
def test_every_optimizer_finds_a_minimum(name: str) -> None:
    torch.manual_seed(0)
    model, target = nn.Linear(4, 4), torch.arange(16.0).view(4, 4) / 16
    optimizer = create_optimizer(model, OptimizerConfig(name, lr=0.05, weight_decay=0))
    losses = []
    for step in range(400):
        set_learning_rate(optimizer, 0.05 * (1 - step / 400))
        optimizer.zero_grad()
        loss = (model.weight - target).square().mean() + model.bias.square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("base", [name for name in OPTIMIZERS if f"lookahead_{name}" in OPTIMIZERS])
def test_lookahead_goes_a_part_of_the_way_from_where_it_started(base: str) -> None:
    model, alone = _model(), _model()
    config = OptimizerConfig(f"lookahead_{base}", lr=0.01, lookahead_steps=3, lookahead_fraction=0.25)
    start = [parameter.detach().clone() for parameter in model.parameters()]
    plain = create_optimizer(alone, OptimizerConfig(base, lr=0.01))
    optimizer = create_optimizer(model, config)
    assert all(map(torch.equal, _walk(optimizer, model, range(2)), _walk(plain, alone, range(2))))
    fast, moved = _walk(plain, alone, range(2, 3)), _walk(optimizer, model, range(2, 3))
    for slow, far, here in zip(start, fast, moved, strict=True):
        torch.testing.assert_close(here, slow + 0.25 * (far - slow))


def test_ranger_is_radam_with_lookahead() -> None:
    model, by_hand = _model(), _model()
    ranger = create_optimizer(model, OptimizerConfig("ranger", weight_decay=0.0))
    radam = torch.optim.RAdam(by_hand.parameters(), lr=1e-3, betas=(0.95, 0.999))
    slow = [parameter.detach().clone() for parameter in by_hand.parameters()]
    for cycle in range(3):
        steps = range(6 * cycle, 6 * cycle + 6)
        _walk(radam, by_hand, steps)
        with torch.no_grad():
            for parameter, anchor in zip(by_hand.parameters(), slow, strict=True):
                anchor += 0.5 * (parameter - anchor)
                parameter.copy_(anchor)
        for a, b in zip(_walk(ranger, model, steps), slow, strict=True):
            torch.testing.assert_close(a, b)


def test_lion_moves_by_the_sign_of_its_interpolation() -> None:
    model = nn.Linear(3, 2)
    weight, momentum = model.weight.detach().clone(), torch.zeros(2, 3)
    optimizer = create_optimizer(model, OptimizerConfig("lion", lr=0.1, weight_decay=0.2))
    for step in range(4):
        gradient = _gradient(step, weight)
        weight = weight * (1 - 0.1 * 0.2) - 0.1 * (0.9 * momentum + 0.1 * gradient).sign()
        momentum = 0.99 * momentum + 0.01 * gradient
        _walk(optimizer, model, range(step, step + 1))
        torch.testing.assert_close(model.weight.detach(), weight)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_muon_steps_along_an_orthogonal_matrix_of_adamws_size(shape: tuple[int, int]) -> None:
    model = nn.Linear(shape[1], shape[0])
    before = model.weight.detach().clone()
    optimizer = create_optimizer(model, OptimizerConfig("muon", lr=0.1, weight_decay=0.0))
    after, bias = _walk(optimizer, model, range(1))
    step = (before - after) / (0.1 * 0.2 * max(shape) ** 0.5)
    # the paper's five iterations bring singular values near one, not to it
    values = torch.linalg.svdvals(step)
    assert values.min() > 0.5
    assert values.max() < 1.3
    left, _, right = torch.linalg.svd(_gradient(0, before), full_matrices=False)
    assert nn.functional.cosine_similarity(step.flatten(), (left @ right).flatten(), dim=0) > 0.95
    assert ((before - after).square().mean().sqrt() / 0.1).item() == pytest.approx(0.2, rel=0.3)
    assert bias.shape == (shape[0],)


def test_muon_leaves_what_is_no_matrix_to_adamw() -> None:
    model, other = nn.Linear(4, 1), nn.Linear(4, 1)
    other.load_state_dict(model.state_dict())
    results = [
        _walk(create_optimizer(each, OptimizerConfig(name, lr=0.1, weight_decay=0.3)), each, range(3))
        for each, name in ((model, "muon"), (other, "adamw"))
    ]
    assert all(map(torch.equal, *results))


def test_every_optimizer_has_its_own_defaults() -> None:
    assert OptimizerConfig() == OptimizerConfig("adamw", lr=5e-4, weight_decay=1e-2, betas=(0.9, 0.999))
    assert OptimizerConfig("sgd").momentum == 0.9
    assert OptimizerConfig("sgd").betas is None
    lion, adamw = OptimizerConfig("lion"), OptimizerConfig("adamw")
    assert lion.lr < adamw.lr
    assert lion.weight_decay > adamw.weight_decay
    assert create_optimizer(_model(), OptimizerConfig("sgd", momentum=0.0)).defaults["nesterov"] is False


def test_what_was_inherited_has_a_rate_of_its_own() -> None:
    model = _model()
    groups = parameter_groups(model, 0.1, {"0.weight", "0.bias"}, 0.25)
    assert [group["lr_factor"] for group in groups] == [1.0, 1.0, 0.25, 0.25]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.1, 0.0]
    assert groups[2]["params"][0] is model[0].weight
    for name in ("adamw", "muon", "ranger"):
        optimizer = create_optimizer(model, OptimizerConfig(name), {"0.weight", "0.bias"}, 0.25)
        set_learning_rate(optimizer, 0.4)
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert rates[id(model[0].weight)] == pytest.approx(0.1)
        assert rates[id(model[2].bias)] == 0.4


def test_l1_pulls_weights_but_not_biases_towards_zero() -> None:
    model = nn.Linear(3, 2)
    optimizer = create_optimizer(model, OptimizerConfig())
    (model(torch.ones(1, 3)).sum() + 0.3 * model.weight.abs().sum()).backward()
    expected = [model.weight.grad.clone(), model.bias.grad.clone()]
    optimizer.zero_grad()
    model(torch.ones(1, 3)).sum().backward()
    add_l1_gradient(optimizer, 0.3)
    torch.testing.assert_close([model.weight.grad, model.bias.grad], expected)


def test_the_cosine_warms_up_peaks_and_ends_near_zero() -> None:
    config = SchedulerConfig(warmup_fraction=0.1)
    rates = np.array([learning_rate(2.0, config, step, 100) for step in range(100)])
    np.testing.assert_allclose(rates[:10], np.linspace(0.2, 2.0, 10))
    assert rates.argmax() in (9, 10)
    assert (np.diff(rates[10:]) < 0).all()
    assert 0 < rates[-1] < 0.01
    assert rates[55] == pytest.approx(1.0)


def _torchs(scheduler_class: type, n: int, **keywords: object) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = scheduler_class(optimizer, **keywords)
    rates = []
    for _ in range(n):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def test_the_cosine_is_torchs() -> None:
    config = SchedulerConfig(warmup_fraction=0.0)
    expected = _torchs(torch.optim.lr_scheduler.CosineAnnealingLR, 20, T_max=20)
    assert [learning_rate(0.3, config, step, 20) for step in range(20)] == pytest.approx(expected)


@pytest.mark.parametrize("n", [10, 23, 100])
def test_one_cycle_is_torchs(n: int) -> None:
    keywords = {"max_lr": 0.3, "total_steps": n, "cycle_momentum": False}
    expected = _torchs(torch.optim.lr_scheduler.OneCycleLR, n, **keywords)
    config = SchedulerConfig("onecycle")
    assert [learning_rate(0.3, config, step, n) for step in range(n)] == pytest.approx(expected)


def test_one_cycle_can_be_as_short_as_one_step() -> None:
    for n in (1, 2, 3, 4):
        rates = [learning_rate(1.0, SchedulerConfig("onecycle"), step, n) for step in range(n)]
        assert 0.5 < max(rates) <= 1.0
        assert min(rates) > 0
    assert learning_rate(1.0, SchedulerConfig("onecycle", warmup_fraction=0.0), 0, 5) == 1.0


def test_step_is_torchs() -> None:
    expected = _torchs(torch.optim.lr_scheduler.StepLR, 30, step_size=10, gamma=0.1)
    assert [learning_rate(0.3, SchedulerConfig("step"), step, 30) for step in range(30)] == pytest.approx(expected)


def test_plateau_is_torchs() -> None:
    losses = np.random.default_rng(0).normal(size=60).cumsum() * 0.01 + 1
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=3)
    expected = []
    for loss in losses:
        expected.append(optimizer.param_groups[0]["lr"])
        scheduler.step(loss)
    config = SchedulerConfig("plateau")
    rates = [learning_rate(0.3, config, epoch, 60, losses[:epoch]) for epoch in range(60)]
    assert rates == pytest.approx(expected)
    assert rates[-1] < rates[0]


def test_constant_stays_at_the_peak_after_warm_up() -> None:
    config = SchedulerConfig("constant", 0.5)
    assert [learning_rate(1.0, config, step, 4) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_schedule_stays_between_nothing_and_the_peak(name: str) -> None:
    for warmup in (None, 0.0, 0.5):
        config = SchedulerConfig(name, warmup_fraction=warmup)
        rates = [learning_rate(2.0, config, step, 37, [1.0] * (step // 5)) for step in range(37)]
        assert 0 < min(rates) < max(rates) + 1e-12
        assert max(rates) == pytest.approx(2.0, rel=0.02)
        assert max(rates) <= 2.0


def test_every_group_gets_the_rate() -> None:
    optimizer = create_optimizer(nn.Linear(2, 2), OptimizerConfig())
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
