"""What is particular to DTFD: pseudo-bags, what each distillation keeps, and which loss trains which tier."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from aggregators import BagInputError, HeadConfigError, create_aggregator

SIZES = (11, 2, 5)
OFFSETS = torch.tensor([0, 11, 13, 18])
DISTILLATIONS = ["AFS", "MaxS", "MaxMinS"]
every_distillation = pytest.mark.parametrize("distillation", DISTILLATIONS)


def _head(n_classes=3, **keywords):
    torch.manual_seed(0)
    keywords = {"pseudo_bags": 3, "selected": 2, "embed_dim": None, "temperature": 0.25, "dropout": 0.0, **keywords}
    return create_aggregator("dtfd", in_dim=6, n_classes=n_classes, **keywords).double().eval()


def _bags():
    return 2 * torch.randn(18, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _softmax(values, axis=0):
    return np.exp(values) / np.exp(values).sum(axis, keepdims=True)


class _Reference:
    """The equations for one bag, instance by instance."""

    def __init__(self, head, distillation, selected=2, temperature=0.25):
        self.weights = {name: value.numpy() for name, value in head.state_dict().items()}
        self.distillation, self.selected, self.temperature = distillation, selected, temperature

    def linear(self, name, values):
        return values @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0)

    def attention(self, name, values):
        gate = 1 / (1 + np.exp(-self.linear(f"{name}.u", values)))
        hidden = np.tanh(self.linear(f"{name}.v", values)) * gate
        return _softmax(self.linear(f"{name}.w", hidden)[:, 0] / self.temperature)

    def __call__(self, bag):
        """Logits of the bag, logits of its pseudo-bags, attention of its instances."""
        features, parts, pseudo_logits = [], [], []
        for first in range(min(3, len(bag))):
            rows = np.arange(first, len(bag), 3)
            weights = self.attention("pseudo_attention", bag[rows])
            pooled = weights @ bag[rows]
            pseudo_logits.append(self.linear("pseudo_classifier", pooled))
            for kept, share in self.kept(rows, weights, bag, pseudo_logits[-1]):
                features.append(pooled if self.distillation == "AFS" else bag[kept[0]])
                parts.append((kept, share))
        weights = self.attention("attention", np.stack(features))
        attention = np.zeros(len(bag))
        for (kept, share), weight in zip(parts, weights, strict=True):
            attention[kept] += weight * share
        return self.linear("classifier", weights @ np.stack(features)), np.stack(pseudo_logits), attention

    def kept(self, rows, weights, bag, logits):
        """(rows, their shares) of every feature that a pseudo-bag yields."""
        if self.distillation == "AFS":
            return [(rows, weights)]
        scores = weights[:, None] * bag[rows] @ self.weights["pseudo_classifier.weight"].T
        chosen = -1 if len(logits) == 2 else logits.argmax()
        ranked = rows[np.argsort(-_softmax(scores, 1)[:, chosen])]
        ends = list(ranked[: self.selected])
        if self.distillation == "MaxMinS":
            ends += [row for row in ranked[-self.selected :] if row not in ends]
        return [(np.array([row]), 1.0) for row in ends]


@pytest.mark.parametrize("n_classes", [2, 3])
@every_distillation
def test_definition(distillation, n_classes):
    head, bags = _head(n_classes, distillation=distillation), _bags()
    output, reference = head(bags, OFFSETS), _Reference(head, distillation)
    pseudo_logits = output.extras["pseudo_logits"].split((3, 2, 3))
    attention = output.attention.split(SIZES)
    for at, bag in enumerate(bags.split(SIZES)):
        expected = reference(bag.numpy())
        got = (output.logits[at], pseudo_logits[at], attention[at][:, 0])
        for mine, theirs in zip(got, expected, strict=True):
            np.testing.assert_allclose(mine.detach(), theirs, atol=1e-12)


@every_distillation
def test_instance_logits_sum_to_the_logits_of_their_pseudo_bag(distillation):
    head = _head(distillation=distillation)
    output = head(_bags()[:11])
    parts = [output.instance_logits[first::3].sum(0) for first in range(3)]
    torch.testing.assert_close(torch.stack(parts) + head.pseudo_classifier.bias, output.extras["pseudo_logits"])


def test_attention_in_16_bits_is_that_of_both_tiers():
    """Logs of the weights of a large bag, kept in 16 bits, would be off by several percent."""
    head = _head(temperature=1.0).bfloat16()
    output = head(torch.randn(3000, 6, generator=torch.Generator().manual_seed(1)))
    for first in range(3):
        share = output.attention[first::3] / output.extras["pseudo_attention"][first::3]
        torch.testing.assert_close(share, share[:1].expand_as(share), rtol=1e-3, atol=0)


def test_a_single_logit_ranks_instances_by_itself():
    head = _head(n_classes=1, distillation="MaxS", selected=1, pseudo_bags=1)
    output = head(_bags()[:11])
    assert output.extras["selected_index"].tolist() == [int(output.instance_logits.argmax())]
    assert int(output.attention.argmax()) == int(output.instance_logits.argmax())


def test_the_own_loss_is_the_mean_over_bags_of_the_mean_over_pseudo_bags():
    head, labels = _head(), torch.tensor([2, 0, 1])
    output = head(_bags(), OFFSETS)
    parts = output.extras["pseudo_logits"].split((3, 2, 3))
    losses = [
        functional.cross_entropy(part, label.repeat(len(part))) for part, label in zip(parts, labels, strict=True)
    ]
    torch.testing.assert_close(head.auxiliary_loss(output, labels, OFFSETS), torch.stack(losses).mean())
    several = functional.one_hot(labels, 3)
    losses = [
        functional.binary_cross_entropy_with_logits(part, label.expand(len(part), -1).double())
        for part, label in zip(parts, several, strict=True)
    ]
    torch.testing.assert_close(head.auxiliary_loss(output, several, OFFSETS), torch.stack(losses).mean())
    with pytest.raises(BagInputError, match="got targets of shape"):
        head.auxiliary_loss(output, torch.tensor([0.5, 1.5, 2.5]), OFFSETS)


@every_distillation
def test_each_tier_learns_from_its_own_loss_where_asked_for(distillation):
    head, labels = _head(distillation=distillation, end_to_end=False, embed_dim=4).train(), torch.tensor([2, 0, 1])
    first_tier = {name for name, _ in head.named_parameters() if name.startswith(("projection", "pseudo"))}
    output = head(_bags(), OFFSETS)
    functional.cross_entropy(output.logits, labels).backward(retain_graph=True)
    reached = {name for name, p in head.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {name for name, _ in head.named_parameters()} - first_tier
    head.zero_grad()
    head.auxiliary_loss(output, labels, OFFSETS).backward()
    reached = {name for name, p in head.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == first_tier


@pytest.mark.parametrize("n_classes", [1, 2, 3])
@pytest.mark.parametrize("official", [False, True])
@every_distillation
def test_one_bag_in_operations_of_any_size_is_what_many_bags_give(distillation, official, n_classes):
    """Of bags with fewer instances than pseudo-bags, than selected ones, and with more."""
    head = _head(n_classes, distillation=distillation, official=official, pseudo_bags=4)
    for count in (1, 2, 3, 5, 9, 18):
        output, (logits, attention) = head(_bags()[:count]), head.one_bag(_bags()[:count])
        torch.testing.assert_close(logits, output.logits)
        torch.testing.assert_close(attention, output.attention)


@every_distillation
def test_training_draws_new_pseudo_bags_within_each_bag(distillation):
    head, bags = _head(distillation=distillation), _bags()
    by_index = head(bags, OFFSETS)
    head.train()

    def run(seed):
        return head(bags, OFFSETS, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(run(0).logits, run(0).logits)
    assert not torch.equal(run(0).logits, run(1).logits)
    assert not torch.equal(run(0).logits, by_index.logits)
    inside = [part[:, 0].sum() for part in run(0).extras["pseudo_attention"].split(SIZES)]
    torch.testing.assert_close(torch.stack(inside), torch.tensor([3.0, 2.0, 3.0]).double())  # one per pseudo-bag
    head.shuffle = False
    assert torch.equal(run(0).logits, by_index.logits)


def test_one_pseudo_bag_makes_shuffling_void():
    """The division into pseudo-bags is all that the order of instances decides."""
    head, bags = _head(pseudo_bags=1), _bags()
    order = torch.randperm(11, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(head(bags[:11][order]).logits, head(bags[:11]).logits)
    torch.testing.assert_close(head(bags[:11][order]).attention, head(bags[:11]).attention[order])


@pytest.mark.parametrize(
    "keywords",
    [{"distillation": "Max"}, {"pseudo_bags": 0}, {"selected": 0}, {"attention_dim": 0}, {"temperature": 0.0}],
)
def test_values_out_of_range_are_refused(keywords):
    with pytest.raises(HeadConfigError, match=f"got {next(iter(keywords))}"):
        create_aggregator("dtfd", in_dim=6, n_classes=3, **keywords)
