"""Augmentation of bags in training."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mil.bags.augment import Batch, augment, strength
from mil.config.sections import AugmentConfig

DIM, CLASSES = 3, 4
EVERYTHING = {"noise": 0.5, "bag_mixup": 0.8, "embedding_mixup": 0.8, "pseudo_bags": 3}


def _batch(sizes: list[int], seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.nn.functional.one_hot(torch.arange(len(sizes)) % CLASSES, CLASSES).float()
    # the first feature names the bag, so that a test sees where an instance came from
    instances = torch.randn(sum(sizes), DIM, generator=generator)
    instances[:, 0] = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).float()
    return Batch(instances, torch.tensor([0, *sizes]).cumsum(0), targets)


def _apply(batch: Batch, seed: int = 0, level: float = 1.0, **options: object) -> Batch:
    return augment(batch, AugmentConfig(**options), level, torch.ones(DIM), torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.integers(0, 99),
    st.floats(0.01, 1),
    st.sampled_from(["all", "random"]),
    st.sets(st.sampled_from(sorted(EVERYTHING)), min_size=1),
)
def test_whatever_is_done_bags_stay_bags(
    sizes: list[int], seed: int, level: float, policy: str, names: set[str]
) -> None:
    chosen = {name: EVERYTHING[name] for name in names}
    found = _apply(_batch(sizes), seed, level, policy=policy, **chosen)
    assert found.offsets[0] == 0
    assert found.offsets[-1] == len(found.instances)
    assert bool((found.offsets.diff() >= 1).all())
    assert found.targets.shape == (len(found.offsets) - 1, CLASSES)
    torch.testing.assert_close(found.targets.sum(dim=1), torch.ones(len(found.targets)))
    assert bool((found.targets >= 0).all())
    again = _apply(_batch(sizes), seed, level, policy=policy, **chosen)
    for one, other in zip(found, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", EVERYTHING)
def test_each_does_something_and_nothing_at_level_zero(name: str) -> None:
    batch = _batch([8, 8, 8, 8])
    changed = _apply(batch, seed=1, **{name: EVERYTHING[name]})
    assert (
        changed.instances.shape != batch.instances.shape
        or not torch.equal(changed.instances, batch.instances)
        or (changed.offsets.tolist() != batch.offsets.tolist())
    )
    for level, options in ((0.0, {name: EVERYTHING[name]}), (1.0, {})):
        same = _apply(batch, level=level, **options)
        assert all(torch.equal(one, other) for one, other in zip(same, batch, strict=True))


def test_noise_follows_the_features_own_deviation() -> None:
    batch = Batch(torch.zeros(20_000, 2), torch.tensor([0, 20_000]), torch.eye(CLASSES)[:1])
    scale = torch.tensor([1.0, 10.0])
    found = augment(batch, AugmentConfig(noise=0.2), 0.5, scale, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.instances.std(dim=0), torch.tensor([0.1, 1.0]), rtol=0.03, atol=0)


def test_a_mixed_bags_label_is_the_share_of_its_instances() -> None:
    batch = _batch([10, 20, 30, 40])
    found = _apply(batch, seed=3, bag_mixup=1.0)
    assert found.offsets.diff().tolist() == [10, 20, 30, 40]
    for bag, rows in enumerate(found.split()):
        origins = rows[:, 0].long()
        share = torch.stack([(origins == other).float().mean() for other in range(4)])
        torch.testing.assert_close(found.targets[bag], share)
        assert share[bag] >= 0.5


def test_instances_are_mixed_in_proportion_to_the_label() -> None:
    found = _apply(_batch([6, 6], 1), seed=4, embedding_mixup=1.0)
    for bag, rows in enumerate(found.split()):
        other = 1 - bag
        share = found.targets[bag, other]
        torch.testing.assert_close(rows[:, 0], torch.full((6,), float((1 - share) * bag + share * other)))
        assert share <= 0.5


def test_pseudo_bags_deal_out_every_instance_once() -> None:
    batch = _batch([7, 2, 1])
    found = _apply(batch, seed=5, pseudo_bags=3)
    assert len(found.offsets) - 1 == 3 + 2 + 1
    assert sorted(map(tuple, found.instances.tolist())) == sorted(map(tuple, batch.instances.tolist()))
    for rows, target in zip(found.split(), found.targets, strict=True):
        assert len(set(rows[:, 0].tolist())) == 1
        assert torch.equal(target, batch.targets[int(rows[0, 0])])


def test_strength_grows_and_never_falls() -> None:
    for schedule in ("linear", "cosine"):
        grows = AugmentConfig(noise=1.0, schedule=schedule, ramp=0.6)
        levels = [strength(grows, epoch, 40) for epoch in range(1, 41)]
        assert levels[0] == 0
        assert levels == sorted(levels)
        assert levels[24:] == [1.0] * 16
    assert strength(AugmentConfig(noise=1.0), 1, 40) == 1.0
    assert strength(AugmentConfig(noise=1.0, schedule="linear"), 1, 1) == 0.0


def test_a_random_policy_draws_one_at_a_time() -> None:
    batch = _batch([8, 8, 8, 8])
    kinds = set()
    for seed in range(40):
        found = _apply(batch, seed, policy="random", **EVERYTHING)
        split = len(found.offsets) != len(batch.offsets)
        mixed = not torch.equal(found.targets.sum(0), batch.targets.sum(0)) or bool(
            ((found.targets > 0).sum(1) > 1).any()
        )
        kinds.add("pseudo" if split else "mixed" if mixed else "noise")
    assert kinds == {"pseudo", "mixed", "noise"}


def test_shares_come_from_a_beta_distribution() -> None:
    batch = _batch([1000] * 400)
    found = _apply(batch, seed=6, bag_mixup=1.0)
    own = found.targets.gather(1, batch.targets.argmax(1, keepdim=True)).squeeze(1)
    # Beta(1, 1) folded at one half is uniform on [0, 0.5]; a quarter of the partners has the same label
    given_away = 1 - own[own < 1]
    assert 0.2 < float(given_away.mean()) < 0.3
