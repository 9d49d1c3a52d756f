"""The training loop of one replica."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mil.bags import Bags
from mil.config import TrainConfig
from mil.errors import BagError, TrainingDivergedError
from mil.evaluation import bag_logits
from mil.losses import balanced_class_weights, log_loss, probabilities
from mil.training import Replica, TrainedReplica, train_replica
from tests.test_mil.small import DIM, fast_config, make_features

CPU = torch.device("cpu")
N = 24
LABELS = (np.arange(N) % 6 < 3).astype(np.int64)
PARTS = np.array(["train", "train", "validation", "test", "train", "test"])[np.arange(N) % 6]


def _bags(matrices: list[np.ndarray] | None = None) -> Bags:
    return Bags([f"s{i}" for i in range(N)], matrices or make_features(N, LABELS))


def _train(config: TrainConfig, bags: Bags | None = None, seed: int = 0) -> TrainedReplica:
    return train_replica(bags or _bags(), LABELS, Replica(0, seed, config), PARTS, 2, CPU)


def test_it_learns() -> None:
    trained = _train(fast_config("epochs=30", "batch_bags=8"))
    right = trained.probabilities.argmax(axis=1) == LABELS
    assert right[PARTS == "test"].mean() >= 0.9
    np.testing.assert_allclose(trained.probabilities.sum(axis=1), 1)


def test_the_seed_decides_every_byte_and_torchs_generators_are_left_alone() -> None:
    config = fast_config("instance_budget=4")
    torch.manual_seed(1)
    first = _train(config)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    torch.rand(7)
    second = _train(config)
    assert first.probabilities.tobytes() == second.probabilities.tobytes()
    assert [replace(r, seconds=0) for r in first.history] == [replace(r, seconds=0) for r in second.history]
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    assert _train(config, seed=1).probabilities.tobytes() != first.probabilities.tobytes()


def test_the_number_of_threads_is_given_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    seen = []
    replica = Replica(0, 0, fast_config("epochs=1"))
    train_replica(_bags(), LABELS, replica, PARTS, 2, CPU, lambda _: seen.append(torch.get_num_threads()))
    assert (seen, torch.get_num_threads()) == ([1], 2)
    torch.set_num_threads(before)


def test_the_best_epoch_is_restored() -> None:
    # features without a signal are learned by heart, so the validation loss falls and rises again
    bags = _bags(make_features(N, np.zeros(N, dtype=np.int64)))
    trained = _train(fast_config("epochs=25", "optimizer.lr=0.05", "scheduler=constant", "patience=25"), bags)
    losses = [record.validation_loss for record in trained.history]
    assert 1 < trained.best_epoch == 1 + int(np.argmin(losses)) < len(losses)
    logits = bag_logits([trained.head], bags, np.flatnonzero(PARTS == "validation"), CPU)[0]
    weights = balanced_class_weights(LABELS[PARTS == "train"], 2)
    targets = torch.from_numpy(LABELS[PARTS == "validation"])
    assert log_loss(logits, targets, weights) == pytest.approx(min(losses))
    everyone = bag_logits([trained.head], bags, np.arange(N), CPU)[0]
    np.testing.assert_allclose(probabilities(everyone).numpy(), trained.probabilities, rtol=1e-6)


def test_it_stops_when_patience_is_over() -> None:
    bags = _bags(make_features(N, np.zeros(N, dtype=np.int64)))
    trained = _train(fast_config("epochs=60", "optimizer.lr=0.05", "scheduler=constant", "patience=3"), bags)
    assert len(trained.history) == trained.best_epoch + 3 < 60
    assert [record.epoch for record in trained.history] == list(range(1, len(trained.history) + 1))


def test_nothing_outside_the_training_part_reaches_the_weights_but_through_stopping() -> None:
    config = fast_config("epochs=3", "patience=3", "batch_bags=5")
    poisoned = make_features(N, LABELS)
    for bag in np.flatnonzero(PARTS != "train"):
        poisoned[bag] = poisoned[bag] * -3 + 500
    clean, other = _train(config), _train(config, _bags(poisoned))
    assert [r.train_loss for r in clean.history] == [r.train_loss for r in other.history]
    for name in ("mean", "std"):
        assert torch.equal(getattr(clean.head.input_norm, name), getattr(other.head.input_norm, name))


def test_test_bags_change_nothing_at_all_but_their_own_predictions() -> None:
    config = fast_config()
    poisoned = make_features(N, LABELS)
    for bag in np.flatnonzero(PARTS == "test"):
        poisoned[bag] = poisoned[bag] * -3 + 500
    clean, other = _train(config), _train(config, _bags(poisoned))
    for a, b in zip(clean.head.state_dict().values(), other.head.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_standardisation_is_that_of_the_training_instances() -> None:
    matrices = make_features(N, LABELS)
    trained = _train(fast_config("epochs=1"), _bags(matrices))
    together = np.concatenate([matrices[bag] for bag in np.flatnonzero(PARTS == "train")]).astype(np.float64)
    np.testing.assert_allclose(trained.head.input_norm.mean, together.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(trained.head.input_norm.std, together.std(axis=0), rtol=1e-5)


class _Spy(Bags):
    """Bags that remember what was asked of them."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.training: list[tuple[list[int], list[int]]] = []
        self.evaluated: list[int] = []

    def pack(self, bags: np.ndarray, rows: dict[int, np.ndarray] | None = None):  # type: ignore[no-untyped-def]
        pack = super().pack(bags, rows)
        if rows is None:
            self.evaluated += bags.tolist()
            assert np.array_equal(np.diff(pack.offsets), self.n_instances[bags])
        else:
            self.training.append((bags.tolist(), np.diff(pack.offsets).tolist()))
        return pack


def test_training_keeps_to_the_budget_and_evaluation_takes_everything() -> None:
    matrices = make_features(N, LABELS)
    spy = _Spy([f"s{i}" for i in range(N)], matrices)
    _train(fast_config("epochs=2", "instance_budget=4", "batch_bags=7"), spy)
    for bags, sizes in spy.training:
        assert sizes == [min(4, len(matrices[bag])) for bag in bags]
        assert len(bags) <= 7
    seen = sorted(bag for bags, _ in spy.training for bag in bags)
    assert seen == sorted(np.flatnonzero(PARTS == "train").tolist() * 2)
    validation = np.flatnonzero(PARTS == "validation").tolist()
    assert spy.evaluated == [*validation, *validation, *range(N)]


def test_replicas_of_one_seed_meet_the_bags_in_one_order() -> None:
    orders = []
    for shift in (0, 1):
        spy = _Spy([f"s{i}" for i in range(N)], make_features(N, LABELS))
        parts = np.roll(PARTS, shift)
        train_replica(spy, LABELS, Replica(shift, 0, fast_config("epochs=1")), parts, 2, CPU)
        orders.append([bag for bags, _ in spy.training for bag in bags])
    common = set(orders[0]) & set(orders[1])
    assert [b for b in orders[0] if b in common] == [b for b in orders[1] if b in common]


def test_a_pack_without_training_bags_takes_no_step() -> None:
    spy = _Spy([f"s{i}" for i in range(N)], make_features(N, LABELS))
    _train(fast_config("epochs=1", "batch_bags=1"), spy)
    assert len(spy.training) == (PARTS == "train").sum()


def test_class_weights_come_from_the_training_part() -> None:
    weights = {"balanced": balanced_class_weights(LABELS[PARTS == "train"], 2), "none": torch.ones(2)}
    assert not torch.equal(weights["balanced"], balanced_class_weights(LABELS, 2))
    targets = torch.from_numpy(LABELS[PARTS == "validation"])
    train_losses = set()
    for kind, expected in weights.items():
        trained = _train(fast_config("epochs=1", f"class_weights={kind}"))
        logits = bag_logits([trained.head], _bags(), np.flatnonzero(PARTS == "validation"), CPU)[0]
        assert trained.history[0].validation_loss == pytest.approx(log_loss(logits, targets, expected))
        train_losses.add(trained.history[0].train_loss)
    assert len(train_losses) == 2


def test_a_loss_that_is_not_finite_names_replica_step_rate_and_slides() -> None:
    with pytest.raises(TrainingDivergedError) as caught:
        _train(
            fast_config(
                "epochs=30",
                "optimizer=sgd",
                "optimizer.lr=1e30",
                "grad_clip=null",
                "batch_bags=8",
                "scheduler=constant",
            )
        )
    message = str(caught.value)
    assert all(part in message for part in ("got loss", "fold0-seed0", "epoch 1, step 2, learning rate 1e+30", "'s"))
    assert isinstance(caught.value, ArithmeticError)


def test_features_that_are_not_finite_stop_it_even_without_standardisation() -> None:
    matrices = make_features(N, LABELS)
    matrices[7][0, 0] = np.inf
    with pytest.raises(BagError, match="'s7'"):
        _train(fast_config("standardize=none"), _bags(matrices))


def test_the_history_says_the_rate_of_the_last_step() -> None:
    trained = _train(fast_config("epochs=4", "scheduler=constant", "scheduler.warmup_fraction=0.5", "batch_bags=12"))
    assert [record.lr for record in trained.history] == pytest.approx([0.005, 0.01, 0.01, 0.01])


def test_the_schedule_reaches_the_optimizer() -> None:
    cosine, constant = (_train(fast_config(f"scheduler={name}", "epochs=3")) for name in ("cosine", "constant"))
    assert cosine.history[-1].train_loss != constant.history[-1].train_loss


def test_gradients_are_clipped_by_their_norm() -> None:
    sgd = ["epochs=1", "optimizer=sgd", "optimizer.weight_decay=0", "batch_bags=24", "scheduler=constant"]
    heads = [
        _train(fast_config(*sgd, f"optimizer.lr={lr}", f"grad_clip={clip}")).head.classifier.weight
        for lr, clip in ((1e-30, 1), (0.1, 1e-9), (0.1, "null"))
    ]
    torch.testing.assert_close(heads[0], heads[1])
    assert (heads[0] - heads[2]).abs().max() > 1e-3


def test_in_dim_and_classes_come_from_the_data() -> None:
    head = _train(fast_config("epochs=1")).head
    assert (head.in_dim, head.training) == (DIM, False)
