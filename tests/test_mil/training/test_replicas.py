"""Lists of replicas: a replica's result is its own."""

import numpy as np
import torch

from mil.bags.bags import Bags
from mil.training.replica import Replica
from mil.training.replicas import Progress, train_replicas
from tests.test_mil.small import fast_config, make_features

CPU = torch.device("cpu")
N = 18
LABELS = np.arange(N) % 2
BAGS = Bags([f"s{i}" for i in range(N)], make_features(N, LABELS))


def _parts(fold: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng((fold, seed))
    return rng.permutation(np.array(["train"] * 10 + ["validation"] * 4 + ["test"] * 4))


def test_a_replica_is_the_same_alone_and_in_any_list() -> None:
    config = fast_config("instance_budget=4", "epochs=3")
    replicas = [Replica(fold, seed, config) for fold in (0, 1) for seed in (0, 1)]

    def results(order: list[int]) -> dict[str, bytes]:
        chosen = [replicas[index] for index in order]
        parts = [_parts(replica.fold, replica.seed) for replica in chosen]
        trained = train_replicas(BAGS, LABELS, chosen, parts, 2, CPU)
        return {each.replica.name: each.probabilities.tobytes() for each in trained}

    together = results([0, 1, 2, 3])
    assert len(set(together.values())) == 4
    assert results([3, 1, 0, 2]) == together
    for index, replica in enumerate(replicas):
        assert results([index]) == {replica.name: together[replica.name]}


def test_progress_tells_every_epoch_and_every_replica() -> None:
    config = fast_config("epochs=2")
    replicas = [Replica(0, seed, config) for seed in (0, 1)]
    events: list[Progress] = []
    parts = [_parts(0, replica.seed) for replica in replicas]
    trained = train_replicas(BAGS, LABELS, replicas, parts, 2, CPU, events.append)
    seen = [(event.replica.name, event.record.epoch if event.record else "done") for event in events]
    assert seen == [(f"fold0-seed{s}", what) for s in (0, 1) for what in (1, 2, "done")]
    assert [event.trained for event in events if event.trained] == trained
    assert {event.n_replicas for event in events} == {2}
