"""What is particular to the transformer: the shortened last block, and attention that stays a distribution."""

import torch

from aggregators import create_aggregator
from aggregators.segment import Segments


def _head(**keywords):
    torch.manual_seed(0)
    return create_aggregator("transformer", in_dim=6, n_classes=3, embed_dim=8, heads=2, **keywords).eval()


def test_the_last_block_gives_the_class_tokens_that_the_whole_block_gives():
    block = _head().last_block
    tokens, segments = torch.randn(9, 8), Segments((4, 2, 3))
    class_tokens, log_attention = block.class_tokens(tokens, segments, None)
    whole = block(tokens, segments, None)
    torch.testing.assert_close(class_tokens, whole[[0, 4, 6]], rtol=1e-5, atol=1e-5)
    sums = torch.stack([part.exp().sum(0) for part in log_attention.split(segments.sizes)])
    torch.testing.assert_close(sums, torch.ones(3, 2))


def test_attention_survives_a_class_token_that_takes_all_of_it():
    """The instances' weights underflow to zero, yet their ratio is known and gradients are finite."""
    head = _head(depth=1)
    with torch.no_grad():  # queries and keys are the normed tokens, and the class token matches itself
        head.class_token.copy_(torch.tensor([[300.0, -300.0] * 4]))
        head.last_block.query.weight.copy_(1e4 * torch.eye(8))
        head.last_block.key_value.weight[:8].copy_(torch.eye(8))
    instances = torch.randn(20, 6)
    output = head(instances, torch.tensor([0, 15, 20]))
    assert output.extras["attention_scores"].max() < -200  # exp of it is 0 in float32
    assert (output.attention >= 0).all()
    torch.testing.assert_close(torch.stack([p.sum() for p in output.attention.split((15, 5))]), torch.ones(2))
    (output.logits.sum() + output.attention.square().sum()).backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_official_only_changes_the_mlp():
    plain, official = _head(mlp_ratio=0), _head(mlp_ratio=0, official=True)
    instances = torch.randn(5, 6)
    assert torch.equal(plain(instances).logits, official(instances).logits)
