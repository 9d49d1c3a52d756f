"""TransMIL gives what the published code gives, with either version of its attention package."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from aggregators import HeadConfigError, OfficialStateError, TransMIL
from aggregators.segment import Segments
from aggregators.transmil import _run_means, nystrom_attention

PARITY = Path(__file__).resolve().parents[1] / "data" / "parity"
SIZES = {"n1": 1, "n7": 7, "n49": 49, "n50": 50, "n300": 300, "n1100": 1100}
FULL_SIZES = {"n20": 20, "n300": 300}
VERSIONS = {"0.0.14": "", "0.0.9": "nystrom009_"}
every_version = pytest.mark.parametrize("version", VERSIONS)
every_case = pytest.mark.parametrize("case", SIZES)


def _load(path):
    with np.load(path, allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


@pytest.fixture(scope="module")
def fixture():
    return _load(PARITY / "transmil.npz")


@pytest.fixture(scope="module")
def full_size(data_folder):
    """2.8 MB, so it stays beside the real data."""
    path = data_folder.parent / "parity" / "transmil_full_size.npz"
    if not path.is_file():
        pytest.skip(f"the fixture of full size is not at {path}")
    return _load(path)


def _state(fixture):
    return {key.removeprefix("state/"): value for key, value in fixture.items() if key.startswith("state/")}


def _head(fixture, version="0.0.14"):
    return TransMIL.from_official(_state(fixture), version).eval()


def _close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def _assert_outputs(fixture, version, case):
    output, prefix = _head(fixture, version)(fixture[f"input/{case}"][0]), f"output/{case}/{VERSIONS[version]}"
    _close(output.logits, fixture[f"{prefix}logits"])
    _close(output.embedding, fixture[f"{prefix}embedding"])
    _close(output.logits.softmax(1), fixture[f"{prefix}Y_prob"])
    assert torch.equal(output.logits.argmax(1), fixture[f"{prefix}Y_hat"])


def _states_of(head, tokens):
    """The tokens after each layer, from what the published code gives to its first."""
    segments = Segments((tokens.shape[0],))
    first = head.block(tokens, segments, None)
    convolved = head.positions(first, segments)
    return {"layer1": first, "ppeg": convolved, "layer2": head.last_block(convolved, segments, None)}


def _attention_matrix(head, tokens):
    """The weights of the last block's attention over padded tokens, read off by identity values."""
    block = head.last_block
    normed, key, _ = block._bags(tokens, Segments((tokens.shape[0],)))[0]
    padding, first = block._padding(len(normed))
    normed, key = (functional.pad(part, (0, 0, padding, 0)) for part in (normed, key))
    query, mean_query = (block._by_head(block.query(part)) for part in (normed, _run_means(normed, block.landmarks)))
    identity = torch.eye(len(normed)).expand(block.heads, -1, -1)
    return nystrom_attention(query, mean_query, block._by_head(key), identity), first


@every_version
@every_case
def test_outputs(fixture, version, case):
    _assert_outputs(fixture, version, case)


@every_version
@pytest.mark.parametrize("case", ["n7", "n50"])
def test_tokens_after_every_layer(fixture, version, case):
    states = _states_of(_head(fixture, version), fixture[f"output/{case}/layer1_input"][0])
    for layer, tokens in states.items():
        _close(tokens, fixture[f"output/{case}/{VERSIONS[version]}after_{layer}"][0])


@every_case
def test_attention_of_the_class_token_before_it_is_used(fixture, case):
    head = _head(fixture)
    bag = head.projection(fixture[f"input/{case}"][0])
    side = int(np.ceil(np.sqrt(SIZES[case])))
    tokens = torch.cat([head.class_token, bag, bag[: side * side - SIZES[case]]])
    tokens = _states_of(head, tokens)["ppeg"]
    matrix, first = _attention_matrix(head, tokens)
    _close(matrix[:, first], fixture[f"output/{case}/layer2_cls_attention"])
    if case == "n7":
        _close(matrix, fixture["output/n7/layer2_attention_full"])


@pytest.mark.parametrize("case", ["n7", "n50"])
def test_gradient_of_the_instances(fixture, case):
    instances = fixture[f"input/{case}"][0].requires_grad_()
    functional.cross_entropy(_head(fixture)(instances).logits, torch.tensor([1])).backward()
    expected = fixture[f"output/{case}/grad_input_ce_y1"][0]
    _close(instances.grad, expected)
    assert expected.abs().max() > 1e-2  # so that the comparison says something


@every_version
def test_packed_bags(fixture, version):
    instances = torch.cat([fixture[f"input/{case}"][0] for case in SIZES])
    output = _head(fixture, version)(instances, Segments(tuple(SIZES.values())).offsets())
    _close(output.logits, torch.cat([fixture[f"output/{case}/{VERSIONS[version]}logits"] for case in SIZES]))


def test_versions_and_the_head_without_padding_differ(fixture):
    heads = [_head(fixture), _head(fixture, "0.0.9"), TransMIL(48, 3, embed_dim=64, landmarks=32).eval()]
    heads[2].load_state_dict(heads[0].state_dict())
    recent, pinned, ours = (head(fixture["input/n50"][0]).logits for head in heads)
    assert (recent - pinned).abs().max() > 0.01
    assert (recent - ours).abs().max() > 0.01


@every_version
@pytest.mark.parametrize("case", FULL_SIZES)
def test_outputs_at_the_published_size(full_size, version, case):
    _assert_outputs(full_size, version, case)


def test_gradient_at_the_published_size(full_size):
    instances = full_size["input/n20"][0].requires_grad_()
    functional.cross_entropy(_head(full_size)(instances).logits, torch.tensor([1])).backward()
    _close(instances.grad, full_size["output/n20/grad_input_ce_y1"][0])


def test_foreign_states_and_versions_are_refused(fixture):
    state = _state(fixture)
    with pytest.raises(HeadConfigError, match=r"got official '0.0.1' → expected True, False or one of 0.0.14, 0.0.9"):
        TransMIL.from_official(state, "0.0.1")
    with pytest.raises(OfficialStateError, match=r"\['extra'\] left over"):
        TransMIL.from_official({**state, "extra": torch.zeros(1)}, "0.0.9")
    del state["pos_layer.proj1.bias"]
    with pytest.raises(OfficialStateError, match=r"\['pos_layer.proj1.bias'\] missing"):
        TransMIL.from_official(state, "0.0.9")
