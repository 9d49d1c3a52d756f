"""ILRA gives what the authors' code gives, with and without LayerNorm."""

import pytest
import torch
from torch.nn import functional

from aggregators import ILRA, OfficialStateError
from aggregators.segment import Segments
from tests.test_aggregators.fixtures import close, load_fixture, state_of

CASES = ["n1", "n7", "n50", "n300", "n7_batch2"]
every_file = pytest.mark.parametrize("name", ["ilra_rank2", "ilra_rank8_ln"])


def _head(fixture):
    return ILRA.from_official(state_of(fixture), heads=8).eval()


def _packed(batch):
    bags, size = batch.shape[:2]
    return batch.flatten(0, 1), Segments((size,) * bags)


@pytest.mark.parametrize("case", CASES)
@every_file
def test_outputs(name, case):
    fixture = load_fixture(name)
    instances, segments = _packed(fixture[f"input/{case}"])
    output, prefix = _head(fixture)(instances, segments.offsets()), f"output/{case}/"
    close(output.logits, fixture[f"{prefix}logits"])
    close(output.embedding, fixture[f"{prefix}embedding"][:, 0])
    close(output.logits.softmax(1), fixture[f"{prefix}Y_prob"])
    assert torch.equal(output.logits.argmax(1), fixture[f"{prefix}Y_hat"][:, 0])


@pytest.mark.parametrize("case", ["n7", "n7_batch2"])
@every_file
def test_instances_after_every_block(name, case):
    fixture = load_fixture(name)
    mixed, segments = _packed(fixture[f"input/{case}"])
    for index, block in enumerate(_head(fixture).blocks):
        mixed = block(mixed, segments)
        close(mixed, fixture[f"output/{case}/after_gab{index}"].flatten(0, 1))


@every_file
def test_gradient_of_the_instances(name):
    fixture = load_fixture(name)
    instances = fixture["input/n50"][0].requires_grad_()
    functional.cross_entropy(_head(fixture)(instances).logits, torch.tensor([1])).backward()
    close(instances.grad, fixture["output/n50/grad_input_ce_y1"][0])


@every_file
def test_packed_bags_of_unequal_size(name):
    fixture = load_fixture(name)
    cases = ["n300", "n1", "n7"]
    instances = torch.cat([fixture[f"input/{case}"][0] for case in cases])
    logits = _head(fixture)(instances, torch.tensor([0, 300, 301, 308])).logits
    close(logits, torch.cat([fixture[f"output/{case}/logits"] for case in cases]))


def test_foreign_states_are_refused():
    state = state_of(load_fixture("ilra_rank8_ln"))
    with pytest.raises(OfficialStateError, match="got no latents"):
        ILRA.from_official({"classifier.weight": state["classifier.weight"]}, heads=8)
    with pytest.raises(OfficialStateError, match=r"\['extra'\] left over"):
        ILRA.from_official({**state, "extra": torch.zeros(1)}, heads=8)
    del state["gab_blocks.1.project_backward.ln1.bias"]
    with pytest.raises(OfficialStateError, match=r"\['gab_blocks.1.project_backward.ln1.bias'\] missing"):
        ILRA.from_official(state, heads=8)
