"""What is particular to CLAM: which instances its clusters hold, what the loss teaches, which targets it takes."""

import numpy as np
import pytest
import torch

from aggregators import BagInputError, HeadConfigError, create_aggregator

OFFSETS = torch.tensor([0, 7, 8, 20])
TARGETS = torch.tensor([2, 0, 1])
both = pytest.mark.parametrize("name", ["clam_sb", "clam_mb"])


def _head(name, **keywords):
    torch.manual_seed(0)
    return create_aggregator(name, in_dim=6, n_classes=3, embed_dim=8, attention_dim=4, k_sample=4, **keywords).eval()


def _instances():
    return torch.randn(20, 6, generator=torch.Generator().manual_seed(2))


def _bag_loss(attention, chances, target, subtyping, k=4):
    """The clustering loss of one bag, instance by instance."""
    total = 0.0
    for c in range(3) if subtyping else [target]:
        order = np.argsort(-attention[:, c % attention.shape[1]])
        if c == target:
            pairs = min(k, len(order) // 2)
            terms = [-chances[i, c, 1] for i in order[:pairs]]
            terms += [-chances[i, c, 0] for i in order[len(order) - pairs :]]
        else:
            terms = [-chances[i, c, 0] for i in order[:k]]
        total += np.mean(terms) if terms else 0.0
    return total / 3 if subtyping else total


@pytest.mark.parametrize("subtyping", [True, False])
@both
def test_the_instance_loss_is_its_definition(name, subtyping):
    head = _head(name, subtyping=subtyping)
    output = head(_instances() * 3, OFFSETS)
    attention = np.split(output.attention.detach().double().numpy(), [7, 8])
    chances = np.split(output.extras["cluster_logits"].log_softmax(2).detach().double().numpy(), [7, 8])
    expected = [_bag_loss(*bag, subtyping) for bag in zip(attention, chances, TARGETS.tolist(), strict=True)]
    losses = head.instance_loss(output, TARGETS, OFFSETS)
    np.testing.assert_allclose(losses.detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    auxiliary = head.auxiliary_loss(output, TARGETS, OFFSETS).item()
    assert auxiliary == pytest.approx(0.3 / 0.7 * np.mean(expected), rel=1e-5)


@both
def test_a_bag_of_one_instance_has_no_cluster_of_its_own(name):
    head = _head(name)
    losses = head.instance_loss(head(_instances(), OFFSETS), TARGETS, OFFSETS)
    assert losses[1] == 0
    assert (losses[[0, 2]] > 0).all()


@both
def test_a_bag_weight_of_one_leaves_the_instance_loss_out(name):
    head = _head(name, bag_weight=1.0)
    output = head(_instances(), OFFSETS)
    assert head.auxiliary_loss(output, torch.rand(3), OFFSETS) == 0
    assert not any("instance" in key for key in head.state_dict())
    with_clusters = _head(name)
    with_clusters.load_state_dict(head.state_dict(), strict=False)
    assert torch.equal(with_clusters(_instances(), OFFSETS).logits, output.logits)


@both
def test_the_instance_loss_teaches_the_clusters(name):
    """Trained on it alone, the target's classifier accepts the most attended instances and refuses the least."""
    head, instances, targets = _head(name), _instances(), torch.tensor([1])
    optimizer = torch.optim.Adam(head.instance_classifier.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        head.auxiliary_loss(head(instances), targets, None).backward()
        optimizer.step()
    output = head(instances)
    order = output.attention[:, output.attention.shape[1] // 2].argsort(descending=True)  # class 1's, or the only one
    accepted = output.extras["cluster_logits"][:, 1].argmax(1)[order]
    assert accepted[:4].all()
    assert not accepted[-4:].any()


def test_every_class_of_clam_mb_reads_its_own_embedding():
    head = _head("clam_mb")
    expected = head(_instances()).logits
    with torch.no_grad():
        head.attention.w.weight[2] += 1.0
    changed = head(_instances()).logits
    assert torch.equal(changed[:, :2], expected[:, :2])
    assert changed[0, 2] != expected[0, 2]


@pytest.mark.parametrize(("gated", "zeroed"), [(False, 0.5), (True, 0.75)])
@both
def test_dropout_acts_on_every_hidden_layer_of_the_attention(name, gated, zeroed):
    head, seen = _head(name, dropout=0.5, gated=gated).train(), []
    head.attention.w.register_forward_pre_hook(lambda _, hidden: seen.append(hidden[0] == 0))
    head.attention(torch.rand(2000, 8), torch.Generator().manual_seed(0))
    assert seen[0].float().mean().item() == pytest.approx(zeroed, abs=0.03)


@pytest.mark.parametrize("size", [5, 8, 40])
@both
def test_instances_of_equal_attention_have_one_answer_each(name, size):
    head = _head(name)
    torch.nn.init.zeros_(head.attention.w.weight)
    output = head(_instances().repeat(2, 1)[:size])
    assert output.attention.unique().numel() == 1
    clusters = output.extras["cluster_logits"]
    (gradient,) = torch.autograd.grad(head.instance_loss(output, torch.tensor([1]), None).sum(), clusters)
    accepted, refused = gradient[:, 1, 1] < 0, gradient[:, 1, 1] > 0  # what raises and what lowers the evidence
    pairs = min(4, size // 2)
    assert (accepted.sum(), refused.sum()) == (pairs, pairs)


@both
def test_one_logit_has_no_classes_to_cluster(name):
    head = create_aggregator(name, in_dim=6, n_classes=1)
    output = head(_instances(), OFFSETS)
    with pytest.raises(BagInputError, match=r"for 1 logits → expected class numbers, .* of at least two classes"):
        head.auxiliary_loss(output, torch.tensor([0, 1, 1]), OFFSETS)


@pytest.mark.parametrize("targets", [torch.rand(3), torch.ones(3, 3, dtype=torch.int64), torch.tensor([1])])
@both
def test_targets_that_are_no_class_numbers_are_refused(name, targets):
    head = _head(name)
    with pytest.raises(BagInputError, match=r"expected class numbers, int64 \[3\], .* → pass bag_weight=1"):
        head.auxiliary_loss(head(_instances(), OFFSETS), targets, OFFSETS)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"bag_weight": 0.0}, "got bag_weight 0.0 → expected above 0"),
        ({"temperature": 0.0}, "got temperature 0.0"),
        ({"attention_dim": 0}, "got attention_dim 0"),
        ({"k_sample": 0}, "got k_sample 0"),
    ],
)
@both
def test_values_out_of_range_are_refused(name, keywords, message):
    with pytest.raises(HeadConfigError, match=message):
        create_aggregator(name, **keywords)
