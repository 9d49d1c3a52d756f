"""TransMIL by its definition, in NumPy and loops; how it lays out a bag; what its attention is."""

import math

import numpy as np
import pytest
import torch

from aggregators import HeadConfigError, create_aggregator
from aggregators.segment import Segments
from aggregators.transmil import _pseudo_inverse, _run_means, nystrom_attention


def _head(**keywords):
    torch.manual_seed(0)
    settings = {"in_dim": 5, "n_classes": 3, "embed_dim": 8, "heads": 2, "landmarks": 3, **keywords}
    return create_aggregator("transmil", **settings).eval()


def _softmax(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _layer_norm(tokens, weight, bias):
    centred = tokens - tokens.mean(1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5) * weight + bias


def _newton(kernels):
    scale = max(kernel.sum(1).max() for kernel in kernels) * max(kernel.sum(0).max() for kernel in kernels)
    inverses = []
    for a in kernels:
        z, eye = a.T / scale, np.eye(len(a))
        for _ in range(6):
            z = z @ (13 * eye - a @ z @ (15 * eye - a @ z @ (7 * eye - a @ z))) / 4
        inverses.append(z)
    return inverses


def _nystrom(query, key, value, landmarks):
    """Lists of [tokens, head_dim], one per head."""
    scale = query[0].shape[1] ** -0.5
    means = [[np.stack([r.mean(0) for r in np.array_split(p, landmarks)]) for p in part] for part in (query, key)]
    inverses = _newton([_softmax(q @ k.T * scale) for q, k in zip(*means, strict=True)])
    return [
        _softmax(q @ mk.T * scale) @ inverse @ _softmax(mq @ k.T * scale) @ v
        for q, k, v, mq, mk, inverse in zip(query, key, value, *means, inverses, strict=True)
    ]


def _block(tokens, state, name, heads, landmarks):
    normed = _layer_norm(tokens, state[f"{name}.norm.weight"], state[f"{name}.norm.bias"])
    weights = [state[f"{name}.query.weight"], *np.split(state[f"{name}.key_value.weight"], 2)]
    query, key, value = (np.split(normed @ weight.T, heads, axis=1) for weight in weights)
    if len(tokens) <= landmarks:
        attended = [_softmax(q @ k.T * q.shape[1] ** -0.5) @ v for q, k, v in zip(query, key, value, strict=True)]
    else:
        attended = _nystrom(query, key, value, landmarks)
    kernels = state[f"{name}.neighbours.weight"][:, 0, :, 0]
    for head in range(heads):
        for row in range(len(tokens)):
            for tap in range(33):
                if 0 <= row + tap - 16 < len(tokens):
                    attended[head][row] += kernels[head, tap] * value[head][row + tap - 16]
    joined = np.concatenate(attended, axis=1)
    return tokens + joined @ state[f"{name}.out.weight"].T + state[f"{name}.out.bias"]


def _convolve(tokens, state):
    side = math.isqrt(len(tokens) - 1)
    grid = tokens[1:].reshape(side, side, -1)
    out = grid.copy()
    for name, reach in (("wide", 3), ("middle", 2), ("narrow", 1)):
        kernel = state[f"positions.{name}.weight"][:, 0]
        padded = np.pad(grid, ((reach, reach), (reach, reach), (0, 0)))
        for row in range(side):
            for column in range(side):
                window = padded[row : row + 2 * reach + 1, column : column + 2 * reach + 1]
                out[row, column] += np.einsum("yxd,dyx->d", window, kernel)
        out += state[f"positions.{name}.bias"]
    return np.concatenate([tokens[:1], out.reshape(side * side, -1)])


def _expected_logits(instances, head, landmarks):
    state = {name: value.double().numpy() for name, value in head.state_dict().items()}
    embedded = np.maximum(instances @ state["projection.linear.weight"].T + state["projection.linear.bias"], 0)
    missing = math.ceil(math.sqrt(len(embedded))) ** 2 - len(embedded)
    tokens = np.concatenate([state["class_token"], embedded, embedded[:missing]])
    tokens = _convolve(_block(tokens, state, "block", 2, landmarks), state)
    last = _block(tokens, state, "last_block", 2, landmarks)[:1]
    normed = _layer_norm(last, state["norm.weight"], state["norm.bias"])
    return normed @ state["classifier.weight"].T + state["classifier.bias"]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 30])
def test_logits_follow_the_definition(count):
    """3 landmarks stand for 2 to 37 tokens, so both the exact and the approximate attention are met."""
    head = _head().double()
    instances = torch.randn(count, 5, dtype=torch.float64)
    expected = torch.from_numpy(_expected_logits(instances.numpy(), head, landmarks=3))
    torch.testing.assert_close(head(instances).logits, expected, rtol=1e-9, atol=1e-9)


def test_the_last_block_gives_the_class_tokens_that_the_whole_block_gives():
    for keywords in ({}, {"official": True}, {"official": "0.0.9"}, {"official": "0.0.9", "landmarks": 40}):
        block = _head(**keywords).last_block
        tokens, segments = torch.randn(72, 8), Segments((50, 17, 5))
        class_tokens, _ = block.class_tokens(tokens, segments, None)
        whole = block(tokens, segments, None)
        torch.testing.assert_close(class_tokens, whole[[0, 50, 67]], rtol=1e-5, atol=1e-5)


def test_as_many_landmarks_as_tokens_is_softmax_attention():
    """The approximation then only has the error of the iteration."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 6, 4, dtype=torch.float64)
    query = key = 3 * query  # so that attention is concentrated and the iteration converges
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(nystrom_attention(query, query, key, value), expected, rtol=1e-3, atol=1e-3)


def test_pseudo_inverse_of_well_conditioned_matrices():
    matrices = (torch.eye(5, dtype=torch.float64) * 4 + torch.rand(3, 5, 5, dtype=torch.float64)).softmax(2)
    torch.testing.assert_close(_pseudo_inverse(matrices), torch.linalg.pinv(matrices), rtol=1e-4, atol=1e-4)


def test_runs_cover_every_token_once_and_differ_by_one_at_most():
    tokens = torch.arange(11.0).reshape(1, 11, 1)
    assert _run_means(tokens, 4).flatten().tolist() == [1.0, 4.0, 7.0, 9.5]  # 3 + 3 + 3 + 2
    assert _run_means(tokens, 11).flatten().tolist() == list(range(11))
    assert _run_means(tokens, 20).flatten().tolist() == list(range(11))


def test_without_a_remainder_the_official_head_is_ours():
    """17 tokens have no padding with 17 landmarks; then only the short cut to exact attention is left out."""
    ours, official = _head(landmarks=17), _head(landmarks=17, official=True)
    small = {"landmarks": 1}  # one landmark never needs padding
    instances = torch.randn(16, 5)
    assert torch.equal(_head(**small)(instances).logits, _head(**small, official=True)(instances).logits)
    assert not torch.equal(ours(instances).logits, official(instances).logits)


def test_copies_that_fill_the_square_count_for_their_originals():
    """Six equal instances fill nine cells, the first three of them twice."""
    head = _head(landmarks=64)
    with torch.no_grad():
        for convolution in head.positions.children():
            convolution.weight.zero_()
        head.block.neighbours.weight.zero_()
    attention = head(torch.ones(6, 5)).attention.flatten()
    torch.testing.assert_close(attention, torch.tensor([2.0, 2, 2, 1, 1, 1]) / 9)


def test_attention_is_what_the_class_token_gathers_where_it_is_exact():
    """Without landmarks' means it is the softmax of the class token's query, less the class token's own share."""
    head = _head(landmarks=64, heads=1)
    bag = torch.randn(4, 5)
    tokens = torch.cat([head.class_token, head.projection(bag)])
    tokens = head.positions(head.block(tokens, Segments((5,)), None), Segments((5,)))
    normed, key, _ = head.last_block._bags(tokens, Segments((5,)))[0]
    weights = (key @ head.last_block.query(normed[0]) * 8**-0.5).softmax(0)[1:]
    torch.testing.assert_close(head(bag).attention.flatten(), weights / weights.sum())


@pytest.mark.parametrize("keywords", [{}, {"landmarks": 8, "norm": "instance"}, {"landmarks": 64, "norm": "batch"}])
def test_one_bag_in_operations_of_any_size_is_what_many_bags_give(keywords):
    """Of bags with fewer tokens than landmarks, as many, and more."""
    head = _head(**keywords).double()
    for count in (1, 2, 3, 4, 5, 7, 9, 10, 30, 63, 64, 65, 100):
        bag = torch.randn(count, 5, dtype=torch.float64)
        output, (logits, attention) = head(bag), head.one_bag(bag)
        torch.testing.assert_close(logits, output.logits, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(attention, output.attention, rtol=1e-9, atol=1e-9)


def test_one_bag_of_any_size_does_not_pad_as_the_published_code():
    with pytest.raises(HeadConfigError, match=r"got official '0\.0\.14'"):
        _head(official=True).one_bag(torch.randn(5, 5))


def test_the_order_of_instances_matters():
    head, bag = _head(), torch.randn(12, 5)
    assert (head(bag).logits - head(bag.flip(0)).logits).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"heads": 3}, "got embed_dim 8 and heads 3"),
        ({"landmarks": 0}, "got landmarks 0"),
        ({"official": "1.0"}, "got official '1.0'"),
        ({"norm": "group"}, "got norm 'group'"),
        ({"dropout": 1.0}, "got dropout 1.0"),
    ],
)
def test_values_out_of_range_are_refused(keywords, message):
    with pytest.raises(HeadConfigError, match=message):
        _head(**keywords)
