"""What is particular to ABMIL: branches, temperature, and that it finds the instances that decide."""

import pytest
import torch
from torch.nn import functional

from aggregators import create_aggregator


def _head(**keywords):
    torch.manual_seed(0)
    return create_aggregator("abmil", in_dim=6, n_classes=2, embed_dim=8, **keywords).eval()


@pytest.mark.parametrize("gated", [True, False])
def test_every_branch_is_a_head_of_one_branch_and_embeddings_are_concatenated(gated):
    head = _head(branches=3, gated=gated)
    instances, offsets = torch.randn(7, 6), torch.tensor([0, 3, 7])
    output = head(instances, offsets)
    assert output.embedding.shape == (2, 3 * 8)
    for branch in range(3):
        state = head.state_dict()
        state["attention.w.weight"] = state["attention.w.weight"][branch : branch + 1]
        state["classifier.weight"] = state["classifier.weight"][:, :8]
        single = _head(gated=gated)
        single.load_state_dict(state)
        expected = single(instances, offsets)
        torch.testing.assert_close(output.attention[:, branch : branch + 1], expected.attention)
        torch.testing.assert_close(output.embedding[:, 8 * branch : 8 * branch + 8], expected.embedding)


def test_temperature_divides_the_scores():
    cold, warm = _head(temperature=1.0), _head(temperature=4.0)
    instances = torch.randn(7, 6) * 10
    scores = cold(instances).extras["attention_scores"]
    torch.testing.assert_close(warm(instances).extras["attention_scores"], scores / 4)
    torch.testing.assert_close(warm(instances).attention, functional.softmax(scores / 4, dim=0))


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_training_from_scratch_finds_the_witnesses_at_any_feature_scale(scale):
    """48 training bags of 60, three of them witnesses that lie off the background by their class's direction."""
    torch.manual_seed(0)
    labels = torch.arange(144) % 2
    bags = torch.randn(144, 60, 16)
    bags[:, :3, 0] += 4 * (2 * labels[:, None] - 1)
    bags *= scale
    offsets = torch.arange(0, 49) * 60
    head = create_aggregator("abmil", in_dim=16, n_classes=2).train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    for _ in range(120):
        optimizer.zero_grad()
        functional.cross_entropy(head(bags[:48].flatten(0, 1), offsets).logits, labels[:48]).backward()
        optimizer.step()
    output = head.eval()(bags[48:].flatten(0, 1), torch.arange(0, 97) * 60)
    assert (output.logits.argmax(1) == labels[48:]).float().mean() > 0.9
    on_witnesses = output.attention.view(96, 60)[:, :3].sum(1).mean()
    assert on_witnesses > 2 * 3 / 60
