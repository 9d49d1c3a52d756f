"""DTFD: same weights, same inputs, same outputs as the published code (tests/data/parity, numbers only).

Their pseudo-bags are runs of a stored permutation, ours are every k-th instance. Handing the instances over in the
order that makes both the same lets the whole head be compared as it is.
"""

import pytest
import torch
from torch.nn import functional

from aggregators import DTFD, HeadConfigError, OfficialStateError
from tests.test_aggregators.fixtures import close, load_fixture, outputs_of, state_of

FILES = ["dtfd_c2", "dtfd_c3"]
CASES = ["n40", "n41_ipg2", "n40_g5_ipg2", "n6_tiny_groups", "n3_empty_group", "n40_ipg0", "n40_two_groupings"]
DISTILLATIONS = ["AFS", "MaxS", "MaxMinS"]
every_file = pytest.mark.parametrize("name", FILES)
every_distillation = pytest.mark.parametrize("distillation", DISTILLATIONS)


def _groups(fixture, case, grouping):
    """Instances of every pseudo-bag of theirs."""
    return fixture[f"aux/{case}/permutation"][grouping].split(fixture[f"aux/{case}/group_sizes"].tolist())


def _order(groups):
    """Order of instances in which every k-th one belongs to pseudo-bag k; larger groups come first."""
    return torch.tensor([int(group[at]) for at in range(len(groups[0])) for group in groups if at < len(group)])


def _official(fixture, case, distillation):
    count = int(fixture[f"aux/{case}/num_groups"])
    selected = int(fixture[f"aux/{case}/total_instance"]) // count
    if distillation == "AFS":
        selected = max(selected, 1)  # not used
    return DTFD.from_official(state_of(fixture), distillation, count, selected).eval()


def _cases(distillation):
    return [case for case in CASES if distillation == "AFS" or case != "n40_ipg0"]


@every_distillation
@every_file
def test_logits_and_probabilities_of_the_slide(name, distillation):
    fixture = load_fixture(name)
    for case in _cases(distillation):
        head, expected = _official(fixture, case, distillation), outputs_of(fixture, case)
        orders = [_order(_groups(fixture, case, at)) for at in range(len(expected["tier1_logits"]))]
        logits = torch.cat([head(fixture[f"input/{case}"][order]).logits for order in orders])
        close(logits, expected[f"{distillation}_tier2_logits"])
        close(logits.softmax(1).mean(0, keepdim=True), expected[f"{distillation}_slide_prob"])
        loss = functional.cross_entropy(logits[:1], fixture[f"label/{case}"])
        close(loss, expected[f"{distillation}_train_loss_tier2"])


@every_file
def test_the_first_tier(name):
    fixture = load_fixture(name)
    for case in CASES:
        head, expected = _official(fixture, case, "AFS"), outputs_of(fixture, case)
        for at, logits in enumerate(expected["tier1_logits"]):
            order = _order(_groups(fixture, case, at))
            output = head(fixture[f"input/{case}"][order])
            close(output.extras["pseudo_logits"], logits)
            close(output.extras["pseudo_attention"][:, 0], expected["attention_in_group"][at][order])
            close(output.instance_logits.softmax(1), expected["cam_softmax"][at][order])
            if at == 0:
                own_loss = head.auxiliary_loss(output, fixture[f"label/{case}"], None)
                close(own_loss, expected["train_loss_tier1"])


@pytest.mark.parametrize("distillation", ["MaxS", "MaxMinS"])
@every_file
def test_selected_instances(name, distillation):
    """Theirs are listed twice where both ends meet, ours once: the weight of an instance says how often it counts."""
    fixture = load_fixture(name)
    for case in _cases(distillation):
        head, expected = _official(fixture, case, distillation), outputs_of(fixture, case)
        for at, theirs in enumerate(expected[f"{distillation}_selected_index"]):
            order = _order(_groups(fixture, case, at))
            output = head(fixture[f"input/{case}"][order])
            selected = output.extras["selected_index"]
            assert torch.equal(order[selected].sort().values, theirs.unique())
            features = expected[f"{distillation}_distilled_features"][at]
            weights = head.attention(features).softmax(0)[:, 0]
            attention = torch.zeros(len(order)).index_add(0, theirs, weights)
            close(output.attention[:, 0], attention[order])


@every_file
def test_features_of_the_pseudo_bags(name):
    fixture = load_fixture(name)
    for case in CASES:
        head, expected = _official(fixture, case, "AFS"), outputs_of(fixture, case)
        features = head.projection(fixture[f"input/{case}"])
        close(features, expected["mid_features"])
        for at, distilled in enumerate(expected["AFS_distilled_features"]):
            groups = _groups(fixture, case, at)
            weights = head.attention(distilled).softmax(0)[:, 0]
            inside = expected["attention_in_group"][at]
            attention = torch.zeros(len(features))
            for group, weight in zip(groups, weights, strict=True):
                attention[group] = weight * inside[group]
            order = _order(groups)
            output = head(fixture[f"input/{case}"][order])
            close(output.embedding[0], weights @ distilled)
            close(output.attention[:, 0], (attention / attention.sum())[order])


@every_distillation
@every_file
def test_packed_bags(name, distillation):
    fixture = load_fixture(name)
    head = _official(fixture, "n40", distillation)
    cases = ["n6_tiny_groups", "n40", "n3_empty_group"]  # of one setting
    orders = [_order(_groups(fixture, case, 0)) for case in cases]
    bags = torch.cat([fixture[f"input/{case}"][order] for case, order in zip(cases, orders, strict=True)])
    offsets, labels = torch.tensor([0, 6, 46, 49]), torch.cat([fixture[f"label/{case}"] for case in cases])
    output, expected = head(bags, offsets), [outputs_of(fixture, case) for case in cases]
    close(output.logits, torch.cat([case[f"{distillation}_tier2_logits"] for case in expected]))
    close(output.extras["pseudo_logits"], torch.cat([case["tier1_logits"][0] for case in expected]))
    losses = torch.stack([case["train_loss_tier1"] for case in expected])
    close(head.auxiliary_loss(output, labels, offsets), losses.mean())


@pytest.mark.parametrize("distillation", ["MaxS", "MaxMinS"])
def test_keeping_no_instance_is_refused(distillation):
    with pytest.raises(HeadConfigError, match="got selected 0"):
        _official(load_fixture("dtfd_c2"), "n40_ipg0", distillation)


def test_the_quirks_show_only_when_asked_for():
    fixture = load_fixture("dtfd_c3")
    for case, distillation in (("n3_empty_group", "AFS"), ("n40", "MaxS"), ("n6_tiny_groups", "MaxMinS")):
        head = _official(fixture, case, distillation)
        bag = fixture[f"input/{case}"][_order(_groups(fixture, case, 0))]
        official = head(bag).logits
        head.official = False
        assert (head(bag).logits - official).abs().max() > 1e-3


def test_foreign_states_are_refused():
    state = state_of(load_fixture("dtfd_c2"))
    with pytest.raises(OfficialStateError, match=r"\['classifier.fc.bias'\] missing"):
        DTFD.from_official({key: value for key, value in state.items() if key != "classifier.fc.bias"})
    with pytest.raises(OfficialStateError, match=r"\['extra'\] left over"):
        DTFD.from_official({**state, "extra": torch.zeros(1)})
