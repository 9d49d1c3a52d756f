"""ILRA by its definition, in NumPy: keys and values of every instance, not folded into the latents."""

import numpy as np
import pytest
import torch

from aggregators import HeadConfigError, create_aggregator

HEADS = 2


def _head(**keywords):
    torch.manual_seed(0)
    settings = {"in_dim": 5, "n_classes": 3, "embed_dim": 8, "heads": HEADS, **keywords}
    return create_aggregator("ilra", **settings).eval()


def _linear(rows, state, name):
    return rows @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)


def _softmax(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _norm(rows, state, name):
    if f"{name}.weight" not in state:
        return rows
    centred = rows - rows.mean(1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
    return normed * state[f"{name}.weight"] + state[f"{name}.bias"]


def _unit(asking, read, state, name):
    """A(asking, read) of the docstring → rows and the attention [heads, asking, read]."""
    query = _linear(asking, state, f"{name}.query")
    parts = [_linear(query, state, f"{name}.head_query")]
    parts += [_linear(read, state, f"{name}.{kind}") for kind in ("key", "value")]
    by_head = zip(*(np.split(part, HEADS, axis=1) for part in parts), strict=True)
    pairs = [(_softmax(q @ k.T / np.sqrt(q.shape[1])), v) for q, k, v in by_head]
    attended = np.concatenate([weights @ v for weights, v in pairs], axis=1)
    out = _norm(query + _linear(attended, state, f"{name}.out"), state, f"{name}.update.attention_norm")
    hidden = np.maximum(_linear(out, state, f"{name}.update.hidden"), 0)
    out = _norm(out + hidden, state, f"{name}.update.hidden_norm")
    if f"{name}.update.gate.weight" in state:
        gate = _linear(asking, state, f"{name}.update.gate")
        out = out * gate / (1 + np.exp(-gate))
    return out, np.stack([weights for weights, _ in pairs])


def _expected(instances, head):
    state = {name: value.numpy() for name, value in head.state_dict().items()}
    for block in range(len(head.blocks)):
        name = f"blocks.{block}"
        latents, _ = _unit(state[f"{name}.gather.latents"], instances, state, f"{name}.gather")
        instances, _ = _unit(instances, latents, state, f"{name}.spread")
    embedding, attention = _unit(state["pooling.latents"], instances, state, "pooling")
    return _linear(embedding, state, "classifier"), attention.mean(0).T


@pytest.mark.parametrize("keywords", [{}, {"norm": "none", "depth": 1}, {"rank": 5, "depth": 3}])
@pytest.mark.parametrize("count", [1, 9])
def test_logits_and_attention_follow_the_definition(count, keywords):
    head = _head(**keywords).double()
    instances = torch.randn(count, 5, dtype=torch.float64)
    output = head(instances)
    for got, expected in zip((output.logits, output.attention), _expected(instances.numpy(), head), strict=True):
        torch.testing.assert_close(got, torch.from_numpy(expected), rtol=1e-9, atol=1e-9)


def test_what_the_bag_adds_to_an_instance_has_the_latents_rank():
    """Before norm and gate, what the heads read lies in heads · rank directions, whatever the bag's size."""
    head = _head(rank=1, embed_dim=16).double()
    update, added = head.blocks[0].spread.update, []
    update.register_forward_pre_hook(lambda module, inputs: added.append(inputs[2]))
    head(torch.randn(40, 5, dtype=torch.float64))
    assert torch.linalg.matrix_rank(added[0]) <= HEADS


def test_instance_norm_leaves_latents_and_pooled_rows_a_layer_norm():
    head = _head(norm="instance")
    kinds = {name: type(module).__name__ for name, module in head.named_modules() if name.endswith("_norm")}
    assert {kind for name, kind in kinds.items() if "spread" in name} == {"InstanceNorm"}
    assert {kind for name, kind in kinds.items() if "gather" in name or "pooling" in name} == {"LayerNorm"}


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"depth": 0}, "got depth 0"),
        ({"rank": 0}, "got rank 0"),
        ({"heads": 3}, "got embed_dim 8 and heads 3"),
        ({"norm": "group"}, "got norm 'group'"),
        ({"dropout": -0.1}, "got dropout -0.1"),
    ],
)
def test_values_out_of_range_are_refused(keywords, message):
    with pytest.raises(HeadConfigError, match=message):
        _head(**keywords)
