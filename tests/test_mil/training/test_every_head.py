"""Every registered head trains, is saved and predicts the same again, and its own loss takes part in training."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from aggregators import aggregator_record, keyword_names, list_aggregators
from mil.config.compose import compose_config
from mil.config.sections import HeadConfig
from mil.deployment.inference import predict
from mil.errors import TrainingDivergedError
from mil.experiments.crossval import train
from mil.training.checkpoint import load_checkpoint
from mil.training.replica import TrainedReplica
from tests.test_mil.small import DIM, make_cohort, make_store

COHORT = make_cohort(8, 1)
STORE = make_store(COHORT)
WITH_A_LOSS = ["acmil", "clam_mb", "clam_sb", "dsmil", "dtfd"]
every_head = pytest.mark.parametrize("name", list_aggregators())


def _one_step(name: str) -> TrainedReplica:
    return train(STORE, COHORT, head=name, folds=2, seeds=1, epochs=1, batch_bags=8, device="cpu").trained[0]


@every_head
def test_every_head_trains_is_saved_and_predicts_the_same(name: str, tmp_path: Path) -> None:
    run = train(STORE, COHORT, head=name, folds=2, seeds=1, epochs=2, device="cpu").save(tmp_path / "run")
    expected = np.stack([each.probabilities for each in run.trained])
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(predict(run.folder, STORE, device="cpu").probabilities, expected.mean(axis=0), rtol=1e-6)
    for each in run.trained:
        head, record = load_checkpoint(run.folder / "checkpoints" / f"{each.replica.name}.safetensors")
        assert (record.head, head.in_dim, head.training) == (name, DIM, False)
        weights = each.head.state_dict()
        assert weights.keys() == head.state_dict().keys()
        assert all(torch.equal(value, weights[key]) for key, value in head.state_dict().items())


@every_head
def test_every_keyword_can_be_set_and_is_kept_by_the_saved_config(name: str, tmp_path: Path) -> None:
    """Written as an override its default is itself, for numbers, switches, choices, lists and nothing alike."""
    defaults = {key: value for key, value in keyword_names(name).items() if key != "input_norm"}
    overrides = [f"head.{key}={json.dumps(value)}" for key, value in defaults.items()]
    config = compose_config([f"head={name}", *overrides])
    plain = compose_config([f"head={name}"])
    assert config == plain
    assert plain.head == HeadConfig(name, {"input_norm": "standardize"})
    assert "dropout" in plain.head.keywords
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert compose_config([], tmp_path / "config.yaml") == config


def test_the_heads_with_a_loss_of_their_own_are_those_tested_here() -> None:
    plain = aggregator_record("mean").builder.auxiliary_loss
    own = [name for name in list_aggregators() if aggregator_record(name).builder.auxiliary_loss is not plain]
    assert own == WITH_A_LOSS


@pytest.mark.parametrize("name", WITH_A_LOSS)
def test_a_heads_own_loss_trains_it_and_is_watched_but_not_recorded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = aggregator_record(name).builder
    expected = _one_step(name)
    monkeypatch.setattr(builder, "auxiliary_loss", lambda self, output, *_: output.logits.new_zeros(()))
    without = _one_step(name)
    assert without.history[0].train_loss == expected.history[0].train_loss
    weights = without.head.state_dict()
    assert any(not torch.equal(value, weights[key]) for key, value in expected.head.state_dict().items())
    monkeypatch.setattr(builder, "auxiliary_loss", lambda self, output, *_: output.logits.sum() * float("nan"))
    with pytest.raises(TrainingDivergedError, match="got loss nan"):
        _one_step(name)
