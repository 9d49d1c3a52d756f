"""What is particular to ACMIL: branches and their mean, the masking, and the likeness of the branches' attention."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from aggregators import BagInputError, HeadConfigError, create_aggregator
from aggregators.acmil import attention_likeness, draw_top_mask
from aggregators.segment import Segments

OFFSETS = torch.tensor([0, 4, 16])


def _head(**keywords):
    torch.manual_seed(0)
    return create_aggregator("acmil", in_dim=6, n_classes=2, embed_dim=None, **{"branches": 3, **keywords}).eval()


def _bags():
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(1))


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_definition():
    head, bags = _head(temperature=0.5).double(), _bags().double()
    output = head(bags, OFFSETS)
    weights = {name: value.numpy() for name, value in head.state_dict().items()}

    def linear(name, values):
        return values @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    for bag, (start, end) in enumerate([(0, 4), (4, 16)]):
        values = bags[start:end].numpy()
        gate = 1 / (1 + np.exp(-linear("attention.u", values)))
        scores = linear("attention.w", np.tanh(linear("attention.v", values)) * gate) / 0.5
        attention = np.exp(scores) / np.exp(scores).sum(0)
        branches = attention.T @ values
        np.testing.assert_allclose(output.attention[start:end].detach(), attention, atol=1e-12)
        np.testing.assert_allclose(output.embedding[bag].detach(), branches.mean(0), atol=1e-12)
        np.testing.assert_allclose(output.logits[bag].detach(), linear("classifier", branches.mean(0)), atol=1e-12)
        for branch in range(3):
            expected = linear(f"branch_classifiers.{branch}", branches[branch])
            np.testing.assert_allclose(output.extras["branch_logits"][bag, branch].detach(), expected, atol=1e-12)


@pytest.mark.parametrize(("top", "rate", "counts"), [(10, 0.6, (2, 6, 0)), (3, 0.5, (1, 1, 0)), (0, 0.6, (0, 0, 0))])
def test_mask_counts_and_candidates(top, rate, counts):
    segments, scores = Segments((4, 12, 1)), torch.randn(17, 3, generator=_generator())
    mask = draw_top_mask(scores, segments, top, rate, _generator())
    for part, bag, count in zip(segments.split(mask), segments.split(scores), counts, strict=True):
        assert part.sum(0).tolist() == [count] * 3
        if count:
            assert (bag >= bag.topk(min(top, len(bag)), dim=0).values[-1])[part].all()


def test_mask_draws_every_candidate_alike_and_each_branch_on_its_own():
    scores, segments = torch.arange(8.0).repeat(3, 1).T, Segments((8,))
    generator = _generator()
    masks = torch.stack([draw_top_mask(scores, segments, 5, 0.6, generator) for _ in range(600)]).float()
    assert not masks[:, :3].any()
    torch.testing.assert_close(masks[:, 3:].mean(0), torch.full((5, 3), 0.6), rtol=0, atol=0.08)
    assert (masks[:, :, 0] != masks[:, :, 1]).any(dim=1).float().mean() > 0.5


def test_masking_takes_the_attention_away_in_training_only():
    head = _head(dropout=0.0)
    bags = _bags()
    whole = head(bags, OFFSETS, generator=_generator())
    assert (whole.attention > 0).all()
    masked = head.train()(bags, OFFSETS, generator=_generator())
    for part, count in zip(masked.attention.split((4, 12)), (2, 6), strict=True):
        assert (part == 0).sum(0).tolist() == [count] * 3
        torch.testing.assert_close(part.sum(0), torch.ones(3))
    loss = functional.cross_entropy(masked.logits, torch.tensor([0, 1]))
    (loss + head.auxiliary_loss(masked, torch.tensor([0, 1]), OFFSETS)).backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_draws_of_the_mask_come_from_the_generator():
    head, bags = _head(dropout=0.0).train(), _bags()
    first, second, other = (head(bags, OFFSETS, generator=_generator(seed)).logits for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_likeness_is_the_mean_cosine_of_all_pairs_of_branches():
    attention, segments = torch.rand(16, 4, generator=_generator()), Segments((4, 12))
    expected = []
    for bag in segments.split(attention):
        pairs = [(bag[:, a], bag[:, b]) for a in range(4) for b in range(a)]
        expected.append(np.mean([float(a @ b / (a.norm() * b.norm())) for a, b in pairs]))
    np.testing.assert_allclose(attention_likeness(attention, segments), expected, rtol=1e-5)


def test_the_own_loss_is_the_mean_over_bags_of_branch_losses_and_likeness():
    head, labels = _head(), torch.tensor([1, 0])
    output = head(_bags(), OFFSETS)
    branch_losses = [functional.cross_entropy(output.extras["branch_logits"][:, k], labels) for k in range(3)]
    likeness = attention_likeness(output.attention, Segments((4, 12)))
    expected = torch.stack(branch_losses).mean() + likeness.mean()
    torch.testing.assert_close(head.auxiliary_loss(output, labels, OFFSETS), expected)
    several = functional.one_hot(labels, 2)
    assert head.auxiliary_loss(output, several, OFFSETS) != expected
    with pytest.raises(BagInputError, match="got targets of shape"):
        head.auxiliary_loss(output, torch.tensor([0.5, 1.5]), OFFSETS)


def test_the_likeness_pushes_the_branches_apart():
    head, bags = _head(branches=2, mask_top=0), _bags()
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    labels, before = torch.tensor([1, 0]), attention_likeness(head(bags).attention, Segments((16,)))
    for _ in range(60):
        optimizer.zero_grad()
        head.auxiliary_loss(head(bags, OFFSETS), labels, OFFSETS).backward()
        optimizer.step()
    assert attention_likeness(head(bags).attention, Segments((16,))) < before - 0.2


def test_one_branch_has_a_loss_unless_official():
    for official in (False, True):
        head = _head(branches=1, official=official)
        loss = head.auxiliary_loss(head(_bags(), OFFSETS), torch.tensor([1, 0]), OFFSETS)
        assert (loss == 0) == official


@pytest.mark.parametrize(
    "keywords",
    [{"branches": 0}, {"mask_top": -1}, {"mask_rate": 1.0}, {"attention_dim": 0}, {"temperature": 0.0}],
)
def test_values_out_of_range_are_refused(keywords):
    with pytest.raises(HeadConfigError, match=f"got {next(iter(keywords))}"):
        create_aggregator("acmil", in_dim=6, n_classes=3, **keywords)
