"""The training loop of one replica."""

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from aggregators.base import Aggregator, BagOutput
from mil.bags.bags import Bags
from mil.bags.forward import bag_logits
from mil.bags.samplers import draw_views
from mil.config.compose import compose_config
from mil.config.options import OPTIMIZERS, RECIPES, SCHEDULERS, TASK_LOSSES
from mil.config.sections import LossConfig, OptimizerConfig, SchedulerConfig
from mil.config.train import TrainConfig
from mil.deployment.packing import pack
from mil.errors import BagError, CheckpointError, ConfigError, TrainingDivergedError
from mil.experiments.crossval import cross_validate
from mil.training import loop as training
from mil.training.loop import train_replica
from mil.training.losses import balanced_class_weights, log_loss, probabilities
from mil.training.replica import Replica, TrainedReplica
from tests.test_mil.small import DIM, fast_config, make_cohort, make_features, make_store

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


PATIENTS = [f"p{at // 2}" for at in range(N)]
MIXED = np.array(["train", "train", "validation", "test", "train"])[np.arange(N) % 5]
TINY = fast_config("epochs=3", "batch_bags=4", "head.dropout=0")
SGD = replace(
    TINY, optimizer=OptimizerConfig("sgd", lr=0.1, weight_decay=0.0), scheduler=SchedulerConfig("constant"), epochs=1
)


def _weights(config: TrainConfig, **keywords: object) -> dict[str, torch.Tensor]:
    return _train(config, **keywords).head.state_dict()  # type: ignore[arg-type]


def _differ(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_trains_under_every_schedule(optimizer: str, scheduler: str) -> None:
    config = replace(TINY, optimizer=OptimizerConfig(optimizer, lr=0.01), scheduler=SchedulerConfig(scheduler))
    trained = _train(config)
    assert all(np.isfinite(record.validation_loss) and record.lr > 0 for record in trained.history)
    losses = [record.train_loss for record in trained.history]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("sampler", ["natural", "class_balanced", "patient_balanced"])
@pytest.mark.parametrize("loss", TASK_LOSSES["classification"])
def test_every_loss_and_sampler_learns(loss: str, sampler: str) -> None:
    config = fast_config("epochs=15", f"loss={loss}", f"sampler={sampler}", "instance_dropout=0.2", "ema=0.9")
    trained = train_replica(_bags(), LABELS, Replica(0, 0, config), MIXED, 2, CPU, patients=PATIENTS)
    right = trained.probabilities.argmax(axis=1) == LABELS
    assert right[MIXED == "test"].mean() >= 0.9


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "clam_official"])
def test_every_recipe_learns(recipe: str) -> None:
    trained = _train(fast_config(f"recipe={recipe}", "epochs=25"))
    assert (trained.probabilities.argmax(axis=1) == LABELS)[PARTS == "test"].mean() >= 0.9


def test_the_official_recipe_trains_one_slide_a_step() -> None:
    config = compose_config(["recipe=clam_official", "epochs=2", "device=cpu"])
    spy = _Spy([f"s{i}" for i in range(N)], make_features(N, LABELS))
    _train(config, spy)
    assert [len(bags) for bags, _ in spy.training] == [1] * (2 * int((PARTS == "train").sum()))


def test_epochs_are_compared_by_cross_entropy_whatever_is_minimised() -> None:
    records = {}
    for loss in (LossConfig(), LossConfig(label_smoothing=0.3), LossConfig("focal"), LossConfig("ordinal")):
        # too small a rate to move, so that all see the same weights
        config = replace(SGD, loss=loss, optimizer=OptimizerConfig("sgd", lr=1e-30))
        (record,) = _train(config).history
        records[loss] = (record.train_loss, record.validation_loss)
    assert len(set(records.values())) == 1
    assert _differ(_weights(SGD), _weights(replace(SGD, loss=LossConfig(label_smoothing=0.3))))


@pytest.mark.parametrize("head", ["abmil", "clam_sb", "dsmil"])
def test_accumulated_packs_are_one_pack(head: str) -> None:
    base = ["epochs=2", f"head={head}", "head.dropout=0", "device=cpu", "optimizer=sgd"]
    one = _train(compose_config([*base, "batch_bags=10"]))
    several = _train(compose_config([*base, "batch_bags=5", "accumulate=2"]))
    for name, value in one.head.state_dict().items():
        torch.testing.assert_close(several.head.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    for a, b in zip(one.history, several.history, strict=True):
        assert (a.lr, a.train_loss) == (b.lr, pytest.approx(b.train_loss))
    plain = _train(compose_config([*base, "batch_bags=5"]))
    assert _differ(plain.head.state_dict(), several.head.state_dict())


class _Narrow:
    """A head's forward that runs out of memory above some bags, at times only in the backward pass."""

    def __init__(self, most_bags: int, backward: bool) -> None:
        self.most_bags, self.backward, self.failed = most_bags, backward, 0
        self.forward = Aggregator.forward

    def __call__(self, head: Aggregator, instances: torch.Tensor, offsets: torch.Tensor, *others: object) -> BagOutput:
        output = self.forward(head, instances, offsets, *others)  # type: ignore[arg-type]
        if not head.training or len(offsets) - 1 <= self.most_bags:
            return output
        self.failed += 1
        if not self.backward:
            raise torch.OutOfMemoryError("fake")
        logits = output.logits * 1

        def fail(_: torch.Tensor) -> None:
            raise torch.OutOfMemoryError("fake")

        # the classifier's gradient is there by then, the projection's is not
        output.embedding.register_hook(fail)
        return output._replace(logits=logits)


def _narrow(monkeypatch: pytest.MonkeyPatch, most_bags: int, backward: bool = False) -> _Narrow:
    narrow = _Narrow(most_bags, backward)
    monkeypatch.setattr(Aggregator, "forward", lambda *arguments: narrow(*arguments))
    return narrow


@pytest.mark.parametrize(("dropout", "sampler"), [(0.0, "natural"), (0.5, "natural"), (0.5, "class_balanced")])
@pytest.mark.parametrize("backward", [False, True])
def test_a_pack_beyond_memory_is_halved_which_is_said_once_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, backward: bool, dropout: float, sampler: str
) -> None:
    keywords = {**SGD.head.keywords, "dropout": dropout}
    config = replace(SGD, epochs=2, batch_bags=16, sampler=sampler, head=replace(SGD.head, keywords=keywords))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = _weights(config)
    narrow = _narrow(monkeypatch, 3, backward)
    with pytest.warns(UserWarning, match="batch_bags=.*accumulate=2") as caught:
        got = _weights(config)
    assert len(caught) == 1
    # a pack of 10 or so is tried whole, halved, and halved again, and no other is tried like that
    assert narrow.failed == 2
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6)


def test_a_single_bag_beyond_memory_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    _narrow(monkeypatch, 0)
    expected = pytest.raises(ConfigError, match=r"single bag.*'s.*instance_budget below 4096")
    with pytest.warns(UserWarning, match="halved"), expected:
        _train(replace(SGD, batch_bags=16))


def test_gradients_are_clipped_by_value() -> None:
    still = _weights(replace(SGD, optimizer=OptimizerConfig("sgd", lr=1e-30)))
    clipped = _weights(replace(SGD, grad_clip=None, grad_clip_value=1e-9))
    torch.testing.assert_close(clipped, still)
    assert _differ(_weights(replace(SGD, grad_clip=None)), clipped)


def test_an_l1_penalty_makes_weights_smaller() -> None:
    totals = [
        float(sum(value.abs().sum() for name, value in _weights(replace(SGD, l1=l1)).items() if value.ndim > 1))
        for l1 in (0.0, 0.05)
    ]
    assert totals[1] < totals[0] - 0.1


def test_the_average_is_what_is_validated_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    averages = []

    class Spy(training.WeightAverage):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            averages.append(self)

    monkeypatch.setattr(training, "WeightAverage", Spy)
    config = replace(TINY, ema=0.95, scheduler=SchedulerConfig("constant"))
    trained = _train(config)
    assert trained.best_epoch == config.epochs
    kept, plain = trained.head.state_dict(), _weights(replace(config, ema=None))
    assert not _differ(kept, averages[0].head.state_dict())
    assert _differ(kept, plain)
    logits = bag_logits([trained.head], _bags(), np.flatnonzero(PARTS == "validation"), CPU)[0]
    targets = torch.from_numpy(LABELS[PARTS == "validation"])
    weights = balanced_class_weights(LABELS[PARTS == "train"], 2)
    assert log_loss(logits, targets, weights) == pytest.approx(trained.history[-1].validation_loss)
    assert trained.parameters == sum(value.numel() for name, value in kept.items() if "input_norm" not in name)


def test_the_plateau_is_that_of_the_validation_loss() -> None:
    bags = _bags(make_features(N, np.zeros(N, dtype=np.int64)))
    scheduler = SchedulerConfig("plateau", patience=1, factor=0.5)
    config = fast_config("epochs=30", "optimizer.lr=0.05", "patience=25")
    history = _train(replace(config, scheduler=scheduler), bags).history
    best, waited, rate = float("inf"), 0, 0.05
    for record in history:
        assert record.lr == pytest.approx(rate)
        waited = 0 if record.validation_loss < best * (1 - 1e-4) else waited + 1
        best = min(best, record.validation_loss) if waited == 0 else best
        if waited > 1:
            rate, waited = rate / 2, 0
    assert rate < 0.05


def test_it_does_not_stop_before_min_epochs() -> None:
    bags = _bags(make_features(N, np.zeros(N, dtype=np.int64)))
    base = ["epochs=60", "optimizer.lr=0.05", "scheduler=constant", "patience=3"]
    early = _train(fast_config(*base), bags)
    late = _train(fast_config(*base, f"min_epochs={len(early.history) + 5}"), bags)
    assert len(late.history) >= len(early.history) + 5


def test_a_balancing_sampler_leaves_no_class_to_be_weighed_but_in_validation() -> None:
    parts = PARTS.copy()
    parts[[0, 6]] = "test"
    config = replace(SGD, sampler="class_balanced")
    balanced, none = (
        train_replica(_bags(), LABELS, Replica(0, 0, replace(config, class_weights=kind)), parts, 2, CPU)
        for kind in ("balanced", "none")
    )
    assert not _differ(balanced.head.state_dict(), none.head.state_dict())
    assert balanced.history[0].validation_loss != none.history[0].validation_loss


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cohort = make_cohort(8, 1)
    config = fast_config("folds=2", "seeds=1", "epochs=2")
    folder = tmp_path_factory.mktemp("init") / "run"
    cross_validate(make_store(cohort), cohort, config).save(folder)
    return folder / "checkpoints" / "fold0-seed0.safetensors"


def _epoch_weights(config: TrainConfig, epochs: int, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """Weights after each epoch."""
    seen = []
    validate = training._Loop.validate

    def spy(loop: training._Loop) -> tuple[float, float]:
        seen.append({name: value.detach().clone() for name, value in loop.head.named_parameters()})
        return validate(loop)

    monkeypatch.setattr(training._Loop, "validate", spy)
    train_replica(_bags(), np.arange(N) % 3, Replica(0, 0, config), PARTS, 3, CPU)
    assert len(seen) == epochs
    return seen


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "ranger"])
def test_what_comes_from_a_checkpoint_is_held_still_at_first(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    config = fast_config(f"init={checkpoint}", "freeze_epochs=2", f"optimizer={optimizer}", "optimizer.lr=0.01")
    after = _epoch_weights(config, 4, monkeypatch)
    saved = training.create_aggregator("abmil", in_dim=DIM, n_classes=2, **config.head.keywords)
    from safetensors.torch import load_file

    saved.load_state_dict(load_file(checkpoint))
    theirs = dict(saved.named_parameters())
    # three classes instead of two: the classifier is fresh
    fresh = {"classifier.weight", "classifier.bias"}
    for name in theirs:
        if name in fresh:
            assert not torch.equal(after[0][name], after[1][name])
        else:
            assert torch.equal(after[1][name], theirs[name]), name
            assert not torch.equal(after[2][name], theirs[name]), name


def test_what_comes_from_a_checkpoint_learns_more_slowly(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, moved = "projection.linear.weight", []
    for factor in (1e-3, 1.0):
        config = fast_config(f"init={checkpoint}", f"freeze_lr_factor={factor}", "epochs=2", "optimizer.weight_decay=0")
        with monkeypatch.context() as context:
            after = _epoch_weights(config, 2, context)
        moved.append(float((after[1][name] - after[0][name]).abs().max()))
    assert moved[0] < 0.01 * moved[1]


def test_a_checkpoint_that_does_not_serve_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        _train(fast_config(f"init={tmp_path / 'none.safetensors'}"))
    with pytest.raises(CheckpointError, match="none of its weight matrices"):
        _train(compose_config([f"init={checkpoint}", "head=mean", "device=cpu"]))
    with pytest.raises(CheckpointError, match="nothing would be trained"):
        _train(fast_config(f"init={checkpoint}", "freeze_epochs=1"))


def test_weights_that_know_the_cohort_are_refused_wherever_it_lies(tmp_path: Path) -> None:
    cohort = make_cohort(8, 1)
    config = fast_config("folds=2", "seeds=1", "epochs=2")
    cross_validate(make_store(cohort), cohort, replace(config, store=tmp_path / "a.zarr")).save(tmp_path / "run")
    pack(tmp_path / "run", tmp_path / "model", calibrate=False)
    moved = replace(cohort, slide_ids=tuple(f"elsewhere/{slide}" for slide in cohort.slide_ids), target="grade")
    store = make_store(moved)
    for folder in ("run", "model"):
        weights = tmp_path / folder / "checkpoints" / "fold0-seed0.safetensors"
        with pytest.raises(CheckpointError, match=r"trained on 8 slides and 8 patients.*another cohort"):
            cross_validate(store, moved, replace(config, init=weights))
    names = {"slide_ids": tuple(f"new {at}" for at in range(8)), "patient_ids": tuple(f"q{at}" for at in range(8))}
    other = replace(cohort, **names)
    cross_validate(make_store(other), other, replace(config, init=weights))
    for file in ("fold0-seed0.safetensors", "fold0-seed0.json"):
        (tmp_path / "alone" / "checkpoints").mkdir(parents=True, exist_ok=True)
        (tmp_path / "alone" / "checkpoints" / file).write_bytes((tmp_path / "run" / "checkpoints" / file).read_bytes())
    alone = replace(config, init=tmp_path / "alone" / "checkpoints" / "fold0-seed0.safetensors")
    with pytest.warns(UserWarning, match="nothing beside it says which slides"):
        cross_validate(make_store(other), other, alone)


def test_a_seed_decides_every_byte_of_a_recipe_with_everything() -> None:
    config = fast_config(
        "recipe=strong", "sampler=patient_balanced", "accumulate=2", "batch_bags=3", "l1=1e-3", "grad_clip_value=0.1"
    )
    a, b, c = (
        train_replica(_bags(), LABELS, Replica(0, seed, config), PARTS, 2, CPU, patients=PATIENTS) for seed in (0, 0, 1)
    )
    assert a.probabilities.tobytes() == b.probabilities.tobytes() != c.probabilities.tobytes()
    with pytest.raises(ConfigError, match="patient_balanced without"):
        _train(config)


def _augmented(*more: str) -> TrainConfig:
    return fast_config("augment=strong", "augment.embedding_mixup=0.4", "epochs=5", "batch_bags=6", *more)


def test_augmentation_begins_gently_and_changes_what_is_learned() -> None:
    plain = _train(fast_config("epochs=5", "batch_bags=6"))
    changed = _train(_augmented())
    assert not np.array_equal(changed.probabilities, plain.probabilities)
    # strength zero in the first epoch of a growing schedule
    assert changed.history[0].train_loss == pytest.approx(plain.history[0].train_loss, abs=1e-5)
    np.testing.assert_array_equal(_train(_augmented()).probabilities, changed.probabilities)


def test_each_augmentation_can_be_set_alone() -> None:
    for key in ("noise=0.5", "bag_mixup=1", "embedding_mixup=1", "pseudo_bags=2"):
        trained = _train(fast_config(f"augment.{key}", "epochs=2"))
        assert np.isfinite(trained.probabilities).all()
    with pytest.raises(ConfigError, match=r"augment\.bag_mixup with head\.positions=sincos"):
        compose_config(["head=transformer", "head.positions=sincos", "augment.bag_mixup=0.5"])


def test_views_are_drawn_for_training_and_never_for_scoring() -> None:
    matrices = make_features(N, LABELS)
    same, far = ([matrix.copy() for matrix in matrices], [-50 * np.ones_like(matrix) for matrix in matrices])
    plain = _train(fast_config("epochs=2"), Bags([f"s{i}" for i in range(N)], matrices))
    for views, equal in (([same], True), ([far], False)):
        bags = Bags([f"s{i}" for i in range(N)], matrices, views=views)
        sampled = _train(fast_config("epochs=2", "views=sample"), bags)
        assert np.array_equal(sampled.probabilities, plain.probabilities) == equal
        ignored = _train(fast_config("epochs=2"), bags)
        np.testing.assert_array_equal(ignored.probabilities, plain.probabilities)
    drawn = [draw_views(bags, np.arange(N), 0, epoch) for epoch in range(1, 30)]
    share = np.mean([[each[bag] for bag in range(N)] for each in drawn])
    assert 0.4 < share < 0.6
    assert drawn[0] == draw_views(bags, np.arange(N), 0, 1) != drawn[1]
