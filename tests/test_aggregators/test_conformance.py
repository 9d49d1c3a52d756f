"""The contract of a head, for every registered one: registering a head is what gets it tested."""

import copy
import io
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch.func import functional_call
from torch.nn import functional

from aggregators import (
    BagDraws,
    BagInputError,
    OffsetsError,
    aggregator_record,
    create_aggregator,
    keyword_names,
    list_aggregators,
)
from aggregators.segment import Segments, segment_mean, segment_softmax

IN_DIM, CLASSES = 12, 3
SIZES = (5, 1, 9, 2)
# Settings beyond the defaults that a head must also hold the contract in.
VARIANTS = {
    "abmil": [
        {"gated": False},
        {"branches": 3, "temperature": 0.5},
        {"embed_dim": None, "input_norm": "layer"},
        {"input_norm": "standardize"},
    ],
    "acmil": [
        {"branches": 1},
        {"branches": 2, "temperature": 0.5, "input_norm": "layer"},
        {"embed_dim": None, "official": True},
    ],
    "additive": [{"hidden_dim": None, "temperature": 0.5}, {"embed_dim": None, "input_norm": "layer"}],
    "chowder": [
        {"top": 2, "bottom": 0, "branches": 3},
        {"embed_dim": 6, "hidden_dims": (), "input_norm": "standardize"},
    ],
    "clam_mb": [
        {"subtyping": True, "input_norm": "layer"},
        {"gated": False, "bag_weight": 1.0},
        {"embed_dim": None, "official": True},
    ],
    "clam_sb": [
        {"subtyping": True, "k_sample": 2},
        {"gated": False, "official": True, "temperature": 2.0},
        {"bag_weight": 1.0, "input_norm": "layer", "embed_dim": None},
    ],
    "dsmil": [
        {"embed_dim": None, "temperature": 2.0, "input_norm": "layer"},
        {"nonlinear": False, "average": True},
        {"value_projection": True},
    ],
    "dtfd": [
        {"distillation": "MaxS", "selected": 2},
        {"distillation": "MaxMinS", "pseudo_bags": 2, "input_norm": "layer"},
        {"official": True},
        {"shuffle": False, "end_to_end": False},
        {"distillation": "MaxMinS", "official": True, "embed_dim": None, "temperature": 2.0},
    ],
    "instance_max": [{"embed_dim": 6}, {"official": True, "embed_dim": 6}],
    "lse": [{"embed_dim": 6, "temperature": 0.2}, {"normalised": False, "input_norm": "layer"}],
    "ilra": [
        {"depth": 1, "rank": 3, "norm": "none"},
        {"norm": "instance"},
        {"embed_dim": 16, "norm": "batch", "input_norm": "layer"},
    ],
    "max": [{"embed_dim": 6}],
    "mean": [{"embed_dim": 6}, {"input_norm": "layer"}],
    "noisy_or": [{"embed_dim": 6, "prior": 0.2}, {"input_norm": "standardize"}],
    "topk": [{"embed_dim": 6, "k": 2}, {"weighting": "softmax", "k": 3, "input_norm": "layer"}],
    "transformer": [
        {"depth": 1, "embed_dim": 8},
        {"depth": 3, "mlp_ratio": 0, "input_norm": "layer"},
        {"official": True},
        {"norm": "instance"},
        {"norm": "batch"},
        {"norm": "none"},
    ],
    "transmil": [
        {"landmarks": 2, "embed_dim": 16},
        {"landmarks": 3, "norm": "instance", "input_norm": "layer"},
        {"landmarks": 4, "norm": "batch"},
        {"landmarks": 4, "norm": "none"},
        {"landmarks": 4, "official": True},
        {"landmarks": 4, "official": "0.0.9"},
    ],
}
# What switches off the draws of training; a head takes those it has.
NO_DRAWS = {"dropout": 0.0, "mask_rate": 0.0, "shuffle": False}
# Widths for numerical gradients; a head takes those it has.
TINY = {"embed_dim": 4, "attention_dim": 3, "heads": 2, "hidden_dim": 3, "hidden_dims": (4, 3)}
SETTINGS = [(name, {}) for name in list_aggregators()]
SETTINGS += [(name, keywords) for name, variants in VARIANTS.items() for keywords in variants]


def _label(setting):
    name, keywords = setting
    return "-".join([name, *(f"{key}={value}" for key, value in keywords.items())])


every_setting = pytest.mark.parametrize("setting", SETTINGS, ids=_label)
every_head = pytest.mark.parametrize("name", list_aggregators())


def _build(setting, in_dim=IN_DIM, **more):
    name, keywords = setting
    torch.manual_seed(7)
    return create_aggregator(name, in_dim=in_dim, n_classes=CLASSES, **{**keywords, **more}).eval()


def _batch(sizes=SIZES, dim=IN_DIM, seed=0, dtype=torch.float32):
    instances = torch.randn(sum(sizes), dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return instances, Segments(tuple(sizes)).offsets()


def _per_bag(output, sizes):
    """Cuts a packed output into one dict of tensors per bag."""
    by_bag = {"logits": output.logits, "embedding": output.embedding}
    by_instance = {"attention": output.attention, "instance_logits": output.instance_logits}
    bags = [{key: value[bag] for key, value in by_bag.items()} for bag in range(len(sizes))]
    for key, value in by_instance.items():
        for bag, part in zip(bags, value.split(sizes) if value is not None else (), strict=False):
            bag[key] = part
    return bags


def _tolerance(setting):
    """Norms over a bag amplify the rounding of features that hardly vary in it by up to 1 / √1e-5, 300 times."""
    return 1e-4 if setting[1].get("norm") == "instance" else 1e-5


def _assert_same(got, expected, exact=False, tolerance=1e-5):
    assert got.keys() == expected.keys()
    for key in got:
        if exact:
            assert torch.equal(got[key], expected[key]), key
        else:
            torch.testing.assert_close(
                got[key], expected[key], rtol=tolerance, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}"
            )


def _without_dropout(setting):
    """In training mode with every draw that the head makes switched off."""
    off = {key: value for key, value in NO_DRAWS.items() if key in keyword_names(setting[0])}
    return _build(setting, **off).train()


def _bags_alone(setting):
    """In training mode, where a bag's output is its own but for batch statistics."""
    if setting[1].get("norm") == "batch":
        pytest.skip("by its definition this norm takes statistics over the pack")
    return _without_dropout(setting)


def _skip_unless_end_to_end(setting):
    if setting[1].get("end_to_end") is False:
        pytest.skip("by its definition the gradient of the logits stops before the instances")


in_both_modes = pytest.mark.parametrize("build", [_build, _bags_alone], ids=["eval", "train-without-dropout"])


def test_every_switch_is_thrown_in_some_variant():
    """Booleans, choices and the projection make other heads of the same name."""
    elsewhere = {"input_norm", "positions"}  # test_base, test_positions
    for name in list_aggregators():
        for keyword, default in keyword_names(name).items():
            values = [variant.get(keyword, default) for variant in VARIANTS.get(name, [])]
            switch = isinstance(default, bool | str) or keyword == "embed_dim"
            assert not switch or keyword in elsewhere or set(values) - {default}, (name, keyword)


@every_setting
def test_output_shapes(setting):
    instances, offsets = _batch()
    head = _build(setting)
    output, branches = head(instances, offsets), getattr(head, "branches", 1)
    bags, total = len(SIZES), sum(SIZES)
    assert output.logits.shape == (bags, CLASSES)
    assert output.embedding.ndim == 2
    assert output.embedding.shape[0] == bags
    assert output.attention is None or output.attention.shape == (total, branches)
    assert output.instance_logits is None or output.instance_logits.shape == (total, CLASSES)


@in_both_modes
@every_setting
def test_packed_equals_one_by_one(setting, build):
    head = build(setting)
    instances, offsets = _batch()
    packed = _per_bag(head(instances, offsets), SIZES)
    for bag, part in enumerate(instances.split(SIZES)):
        _assert_same(packed[bag], _per_bag(head(part), (len(part),))[0], tolerance=_tolerance(setting))


@in_both_modes
@every_setting
def test_any_order_of_bags(setting, build):
    head = build(setting)
    instances, offsets = _batch()
    expected = _per_bag(head(instances, offsets), SIZES)
    parts = instances.split(SIZES)
    for order in ([3, 2, 1, 0], [1, 3, 0, 2]):
        sizes = tuple(SIZES[bag] for bag in order)
        shuffled = head(torch.cat([parts[bag] for bag in order]), Segments(sizes).offsets())
        for got, bag in zip(_per_bag(shuffled, sizes), order, strict=True):
            _assert_same(got, expected[bag], tolerance=_tolerance(setting))


@every_setting
def test_order_of_instances(setting):
    if not aggregator_record(setting[0]).permutation_invariant:
        pytest.skip("by its definition this head sees the order of instances")
    head = _build(setting)
    instances, _ = _batch((30,))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    expected, got = _per_bag(head(instances), (30,))[0], _per_bag(head(instances[order]), (30,))[0]
    for key in expected.keys() & {"attention", "instance_logits"}:
        expected[key] = expected[key][order]
    _assert_same(got, expected)


@in_both_modes
@every_setting
def test_nothing_crosses_bags_bit_for_bit(setting, build):
    """A NaN in another bag shows leaks that a multiplication by zero would hide."""
    head = build(setting)
    instances, offsets = _batch()
    expected = _per_bag(head(instances, offsets), SIZES)
    for value in (1e3, float("nan")):
        for perturbed in range(len(SIZES)):
            changed = [part.clone() for part in instances.split(SIZES)]
            changed[perturbed][0] = value
            got = _per_bag(head(torch.cat(changed), offsets), SIZES)
            if SIZES[perturbed] > 1:  # a norm over a bag may make all bags of one instance alike
                assert not torch.equal(got[perturbed]["logits"], expected[perturbed]["logits"])
            for bag in set(range(len(SIZES))) - {perturbed}:
                _assert_same(got[bag], expected[bag], exact=True)


@every_setting
def test_no_gradient_crosses_bags(setting):
    _skip_unless_end_to_end(setting)
    head = _build(setting)
    instances, offsets = _batch()
    instances.requires_grad_()
    head(instances, offsets).logits[2].square().sum().backward()
    for bag, gradient in enumerate(instances.grad.split(SIZES)):
        assert bool(gradient.any()) == (bag == 2)


@every_setting
def test_attention_is_a_distribution_per_bag_and_branch(setting):
    instances, offsets = _batch((400, 1, 3))
    output = _build(setting)(instances * 20, offsets)
    if output.attention is None:
        pytest.skip("this head has no attention")
    assert (output.attention >= 0).all()
    for part in output.attention.split((400, 1, 3)):
        torch.testing.assert_close(part.sum(0), torch.ones(part.shape[1]), rtol=0, atol=1e-5)
    assert torch.equal(output.attention[400], torch.ones(output.attention.shape[1]))
    scores = output.extras["attention_scores"]
    torch.testing.assert_close(segment_softmax(scores, Segments((400, 1, 3))), output.attention)


@every_setting
def test_mean_of_instance_logits_where_the_head_says_so(setting):
    if setting[0] != "mean":
        pytest.skip("only the mean is made of instance logits")
    instances, offsets = _batch()
    output = _build(setting)(instances, offsets)
    torch.testing.assert_close(segment_mean(output.instance_logits, Segments(SIZES)), output.logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@every_setting
def test_instances_are_cast_to_the_parameters_dtype(setting, dtype):
    head = _build(setting)
    instances, offsets = _batch(dtype=dtype)
    output = head(instances, offsets)
    assert output.logits.dtype == torch.float32
    assert torch.equal(output.logits, head(instances.float(), offsets).logits)


@every_setting
def test_a_bfloat16_head_stays_near_float32(setting):
    instances, offsets = _batch((300, 7))
    exact = _build(setting)(instances, offsets)
    rough = _build(setting).bfloat16()(instances, offsets)
    assert rough.logits.dtype == torch.bfloat16
    if setting[1].get("distillation", "AFS") == "AFS":  # the others keep few instances, and rounding swaps near-equals
        torch.testing.assert_close(rough.logits.float(), exact.logits, rtol=0.05, atol=0.05)
    if rough.attention is not None:
        torch.testing.assert_close(rough.attention[:300].sum(0), torch.ones(rough.attention.shape[1]))


@every_setting
def test_gradients_reach_every_parameter(setting):
    head = _without_dropout(setting)
    instances, offsets = _batch((20, 4, 7))
    output, targets = head(instances, offsets), torch.tensor([0, 1, 2])
    (functional.cross_entropy(output.logits, targets) + head.auxiliary_loss(output, targets, offsets)).backward()
    unreached = [name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()]
    assert unreached == []


@every_setting
def test_numerical_gradients_of_instances_and_parameters(setting):
    _skip_unless_end_to_end(setting)
    name, keywords = setting
    tiny = {
        key: value for key, value in TINY.items() if key in keyword_names(name) and keywords.get(key, 0) is not None
    }
    head = _build((name, {**keywords, **tiny}), in_dim=3).double()
    instances, offsets = _batch((3, 1, 2), dim=3, dtype=torch.float64)
    parameters = dict(head.named_parameters())

    def run(bags, *values):
        output = functional_call(head, dict(zip(parameters, values, strict=True)), (bags, offsets))
        own = head.auxiliary_loss(output, torch.tensor([0, 1, 2]), offsets)
        outputs = (output.logits, output.attention, output.instance_logits, own if own.requires_grad else None)
        return [value for value in outputs if value is not None]

    inputs = [value.detach().requires_grad_() for value in (instances, *parameters.values())]
    assert torch.autograd.gradcheck(lambda *values: tuple(run(*values)), inputs, fast_mode=True)  # random directions


@every_setting
def test_eval_is_deterministic(setting):
    head = _build(setting, dropout=0.5)
    instances, offsets = _batch()
    first = _per_bag(head(instances, offsets), SIZES)
    second = _per_bag(head(instances, offsets, generator=torch.Generator().manual_seed(3)), SIZES)
    for got, expected in zip(second, first, strict=True):
        _assert_same(got, expected, exact=True)


@every_setting
def test_training_draws_come_from_the_generator(setting):
    head = _build(setting, dropout=0.5).train()
    instances, offsets = _batch()

    def logits(seed):
        return head(instances, offsets, generator=torch.Generator().manual_seed(seed)).logits

    assert torch.equal(logits(0), logits(0))
    assert not torch.equal(logits(0), logits(1))


@every_setting
def test_draws_of_a_bag_do_not_depend_on_its_company(setting):
    if setting[1].get("norm") == "batch":
        pytest.skip("norm=batch shares statistics between bags in training")
    head = _build(setting, dropout=0.5).train()
    instances, offsets = _batch()
    seeds = [10 * bag + 5 for bag in range(len(SIZES))]
    with torch.no_grad():
        together = _per_bag(head(instances, offsets, generator=BagDraws(seeds)), SIZES)
        for bag, rows in enumerate(instances.split(SIZES)):
            alone = head(rows, generator=BagDraws(seeds[bag : bag + 1]))
            _assert_same(_per_bag(alone, SIZES[bag : bag + 1])[0], together[bag], tolerance=_tolerance(setting))
            other = head(rows, generator=BagDraws([seeds[bag] + 7])).logits
            assert SIZES[bag] == 1 or not torch.equal(other, alone.logits)


@every_setting
def test_state_dict_round_trip(setting):
    head = _build(setting)
    if hasattr(head.input_norm, "fit"):
        head.input_norm.fit(torch.full((IN_DIM,), 0.5), torch.full((IN_DIM,), 2.0))
    instances, offsets = _batch()
    expected = head(instances, offsets).logits
    buffer = io.BytesIO()
    torch.save(head.state_dict(), buffer)
    buffer.seek(0)
    for state in (torch.load(buffer, weights_only=True), load(save(head.state_dict()))):
        torch.manual_seed(99)
        other = create_aggregator(setting[0], in_dim=IN_DIM, n_classes=CLASSES, **setting[1]).eval()
        assert not torch.equal(other(instances, offsets).logits, expected)
        other.load_state_dict(state)
        assert torch.equal(other(instances, offsets).logits, expected)


@every_head
def test_an_empty_bag_is_refused_by_its_number(name):
    with pytest.raises(OffsetsError, match="bag 1 of 3 with 0 instances"):
        _build((name, {}))(torch.zeros(5, IN_DIM), torch.tensor([0, 2, 2, 5]))


@every_head
def test_one_class_gives_one_logit(name):
    assert create_aggregator(name, in_dim=IN_DIM, n_classes=1)(torch.zeros(2, IN_DIM)).logits.shape == (1, 1)


@in_both_modes
@every_setting
def test_auxiliary_loss_is_the_mean_over_bags_of_each_ones_own(setting, build):
    head, targets = build(setting), torch.tensor([0, 1, 2, 0])
    instances, offsets = _batch()
    loss = head.auxiliary_loss(head(instances, offsets), targets, offsets)
    alone = [
        head.auxiliary_loss(head(bag), target, None)
        for bag, target in zip(instances.split(SIZES), targets.split(1), strict=True)
    ]
    assert loss.shape == ()
    torch.testing.assert_close(loss, torch.stack(alone).mean(), rtol=_tolerance(setting), atol=_tolerance(setting))


@every_setting
def test_auxiliary_loss_of_other_targets_is_finite_or_refused(setting):
    """Several labels at once, real numbers, and one logit: a number, or the error of the contract."""
    instances, offsets = _batch()
    labels, binary = torch.ones(4, CLASSES), torch.tensor([0, 1, 1, 0])
    reals = [torch.tensor([0.1, 0.2, 0.7, 1.0]), torch.full((4, CLASSES), -1.5)]
    for n_classes, targets in ((CLASSES, labels), (1, binary), *((CLASSES, real) for real in reals)):
        keywords = {key: value for key, value in setting[1].items() if n_classes > 1 or key != "official"}
        head = create_aggregator(setting[0], in_dim=IN_DIM, n_classes=n_classes, **keywords)
        output = head(instances, offsets)
        try:
            loss = head.auxiliary_loss(output, targets, offsets)
        except BagInputError:
            continue
        assert loss.isfinite()
        assert loss == 0 or all(targets is not real for real in reals)


@every_setting
def test_equal_instances_give_finite_outputs_and_gradients(setting):
    """Nothing varies within a bag, all scores tie, and the variance over a bag is zero."""
    head, targets = _without_dropout(setting), torch.tensor([0, 1, 2])
    instances, offsets = _batch((1,))[0].repeat(20, 1).requires_grad_(), torch.tensor([0, 1, 8, 20])
    output = head(instances, offsets)
    (functional.cross_entropy(output.logits, targets) + head.auxiliary_loss(output, targets, offsets)).backward()
    assert output.logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in (instances, *head.parameters()) if p.grad is not None)


def _assert_compiled_equals_eager(name, backend):
    torch._dynamo.reset()
    # copied, which leaves the hooks of parameters behind
    eager, head = _without_dropout((name, {})), copy.deepcopy(_without_dropout((name, {})))
    compiled = torch.compile(head, backend=backend)
    for sizes in ((5, 3), (1, 6)):  # the second pack must not be served by the first one's graph
        instances, offsets = _batch(sizes)
        expected, got = eager(instances, offsets), compiled(instances, offsets)
        for mine, reference in zip(_per_bag(got, sizes), _per_bag(expected, sizes), strict=True):
            _assert_same(mine, reference)
        for model, output in ((eager, expected), (head, got)):
            loss = model.auxiliary_loss(output, torch.tensor([0, 1]), offsets)
            (output.logits.square().sum() + loss).backward()
    gradients = [{key: p.grad for key, p in model.named_parameters() if p.grad is not None} for model in (head, eager)]
    _assert_same(*gradients)


@every_head
def test_compiled_equals_eager_in_outputs_and_gradients(name):
    _assert_compiled_equals_eager(name, "aot_eager")


@pytest.mark.slow_compile
@every_head
def test_compiled_to_machine_code_equals_eager_in_outputs_and_gradients(name):
    _assert_compiled_equals_eager(name, "inductor")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_setting
def test_cuda_equals_cpu(setting):
    instances, offsets = _batch()
    expected = _per_bag(_build(setting)(instances, offsets), SIZES)
    head = _build(setting).cuda()
    for cuda_offsets in (offsets, offsets.cuda()):
        got = _per_bag(head(instances.cuda(), cuda_offsets), SIZES)
        for bag, reference in zip(got, expected, strict=True):
            _assert_same({key: value.cpu() for key, value in bag.items()}, reference)


def _peak_mebibytes(run):
    """Peak resident memory above the present, in MiB (Linux)."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not os.access(clear, os.W_OK):
        pytest.skip("peak memory is measured through /proc, which this system lacks")

    def read(field):
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) / 1024

    clear.write_text("5")
    before = read("VmRSS")
    run()
    return read("VmHWM") - before


# cost: instances, limit in MiB. 6,000² scores of four heads alone take 550 MiB, as 12,000² of a single head do, and
# 8,000² of one 245 MiB, on top of the 270 MiB that a training step takes.
QUICK_LIMITS = {"linear": (100_000, 700), "quadratic": (6_000, 250)}
INFERENCE_LIMITS = {"quadratic": (12_000, 500)}
TRAINING_LIMITS = {"linear": (50_000, 600), "quadratic": (8_000, 380)}
# Heads with wide embeddings by default: 512 features of 50,000 instances are 98 MiB for each tensor kept.
WIDE_TRAINING_LIMITS = {"clam_mb": 1_200, "clam_sb": 1_200, "ilra": 1_000, "transmil": 750}
TAKES_SECONDS = {"clam_mb", "clam_sb", "dtfd", "ilra", "transmil"}


def _large_bag(name, limits):
    count, limit = limits[aggregator_record(name).cost]
    instances, _ = _batch((count,), 256, dtype=torch.float16)
    return _build((name, {}), in_dim=256), instances, limit


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in TAKES_SECONDS)) for name in list_aggregators()],
)
def test_inference_on_a_large_bag_is_bounded_in_memory(name):
    head, instances, limit = _large_bag(name, QUICK_LIMITS)
    with torch.no_grad():
        assert _peak_mebibytes(lambda: head(instances)) < limit


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in list_aggregators() if aggregator_record(name).cost == "quadratic"])
def test_inference_of_full_attention_on_a_large_bag_is_bounded_in_memory(name):
    head, instances, limit = _large_bag(name, INFERENCE_LIMITS)
    with torch.no_grad():
        assert _peak_mebibytes(lambda: head(instances)) < limit


@pytest.mark.slow
@every_head
def test_training_on_a_large_bag_is_bounded_in_memory(name):
    head, instances, limit = _large_bag(name, TRAINING_LIMITS)
    limit = WIDE_TRAINING_LIMITS.get(name, limit)
    head.train()

    def step():
        output = head(instances)
        (output.logits.sum() + head.auxiliary_loss(output, torch.tensor([1]), None)).backward()

    assert _peak_mebibytes(step) < limit
