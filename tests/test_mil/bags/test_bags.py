"""Bags: the same bytes from any memory, budgets, moments and errors."""

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from mil.bags.bags import Bags, Memory, ResidentBags, place_bags
from mil.bags.stored import MAPS_KEPT, choose_entry, open_bags, view_entries
from mil.errors import BagError
from tests.test_mil.small import FEATURES, make_cohort, make_features, make_store


def _matrices() -> list[np.ndarray]:
    return make_features(7, np.arange(7) % 2)


def _mapped(matrices: list[np.ndarray], folder: Path) -> list[np.ndarray]:
    for index, matrix in enumerate(matrices):
        np.save(folder / f"{index}.npy", matrix)
    return [np.load(folder / f"{index}.npy", mmap_mode="r") for index in range(len(matrices))]


def test_a_pack_holds_the_bags_in_the_order_asked_for() -> None:
    matrices = _matrices()
    pack = Bags([f"s{i}" for i in range(7)], matrices).pack(np.array([4, 0, 2]))
    assert pack.instances.numpy().dtype == np.float16
    for at, bag in enumerate([4, 0, 2]):
        np.testing.assert_array_equal(pack.instances[pack.offsets[at] : pack.offsets[at + 1]], matrices[bag])
    assert len(pack.instances) == pack.offsets[-1]


def test_ram_and_mmap_give_the_same_bytes(tmp_path: Path) -> None:
    matrices = _mapped(_matrices(), tmp_path)
    ids = [f"s{i}" for i in range(7)]
    mapped, resident = Bags(ids, matrices, "mmap"), Bags(ids, matrices, "ram")
    assert (mapped.memory, resident.memory, Bags(ids, matrices).memory) == ("mmap", "ram", "ram")
    order = np.array([6, 1, 3])
    rows = mapped.draw(order, 3, seed=5, epoch=2)
    a, b = mapped.pack(order, rows), resident.pack(order, rows)
    assert a.instances.numpy().tobytes() == b.instances.numpy().tobytes()
    for x, y in zip(mapped.moments.mean_std(order), resident.moments.mean_std(order), strict=True):
        assert x.numpy().tobytes() == y.numpy().tobytes()


class _Counted:
    """A store of small bags that counts which of its matrices are still held."""

    def __init__(self, n: int) -> None:
        self.path, self.n, self.read, self.most = Path("counted"), n, 0, 0
        self._held: weakref.WeakSet[_Held] = weakref.WeakSet()

    def entries(self) -> list[str]:
        return ["tiny"]

    def slide_ids(self, entry: str | None = None) -> list[str]:
        return [str(i) for i in range(self.n)]

    def __getitem__(self, slide_id: str) -> "_Counted":
        self._slide_id = slide_id
        return self

    def verify_features(self, entry: str) -> None:
        self.read += 1

    def features(self, entry: str) -> np.ndarray:
        matrix = np.full((2, 3), int(self._slide_id), np.float32).view(_Held)
        self._held.add(matrix)
        self.most = max(self.most, len(self._held))
        return matrix


class _Held(np.ndarray):
    """An array that can be watched."""

    __hash__ = object.__hash__


@pytest.mark.parametrize("memory", ["mmap", "ram", "auto"])
def test_few_bags_are_open_at_a_time(memory: Memory) -> None:
    store = _Counted(5 * MAPS_KEPT)
    bags = open_bags(store, store.slide_ids(), "tiny", memory)
    everything = bags.pack(np.arange(store.n)).instances.numpy()
    assert np.array_equal(everything, np.repeat(np.arange(store.n), 2)[:, None] + np.zeros((1, 3)))
    assert np.array_equal(bags.moments.means[:, 0], np.arange(store.n))
    assert store.read == store.n
    assert store.most <= MAPS_KEPT + 2


def test_a_pack_is_a_copy(tmp_path: Path) -> None:
    matrices = _mapped(_matrices(), tmp_path)
    bags = Bags([f"s{i}" for i in range(7)], matrices, "mmap")
    bags.pack(np.array([0])).instances.zero_()
    assert np.asarray(matrices[0]).any()


def test_draws_respect_the_budget_and_depend_on_seed_epoch_and_bag_alone() -> None:
    bags = Bags(["small", "large", "larger"], [np.zeros((n, 2), np.float32) for n in (5, 100, 200)])
    everyone = np.arange(3)
    rows = bags.draw(everyone, 20, seed=1, epoch=1)
    assert set(rows) == {1, 2}
    for bag, drawn in rows.items():
        assert len(np.unique(drawn)) == len(drawn) == 20
        assert drawn.max() < bags.n_instances[bag]
    np.testing.assert_array_equal(bags.draw(np.array([2]), 20, seed=1, epoch=1)[2], rows[2])
    for other in ({"seed": 2, "epoch": 1}, {"seed": 1, "epoch": 2}):
        assert not np.array_equal(bags.draw(everyone, 20, **other)[2], rows[2])
    assert bags.draw(everyone, None, seed=1, epoch=1) == {}
    assert np.diff(bags.pack(everyone, rows).offsets).tolist() == [5, 20, 20]


def test_draws_cover_the_bag_evenly() -> None:
    bags = Bags(["a"], [np.zeros((50, 1), np.float32)])
    counts = np.zeros(50)
    for epoch in range(400):
        counts[bags.draw(np.array([0]), 10, seed=0, epoch=epoch)[0]] += 1
    # 400 draws at probability 0.2: mean 80, standard deviation 8
    assert counts.min() > 80 - 40
    assert counts.max() < 80 + 40


@pytest.mark.parametrize("bound", [1, 8, 12, 1000])
def test_packs_cover_every_bag_once_within_the_bound(bound: int) -> None:
    bags = Bags([f"s{i}" for i in range(7)], _matrices())
    packs = list(bags.packs(np.array([3, 5, 0, 6]), bound))
    assert np.concatenate([pack.bags for pack in packs]).tolist() == [3, 5, 0, 6]
    assert all(len(pack.instances) <= bound or len(pack.bags) == 1 for pack in packs)
    assert all(len(pack.instances) == bags.n_instances[pack.bags].sum() for pack in packs)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_moments_are_those_of_the_instances_put_together(dtype: type) -> None:
    rng = np.random.default_rng(0)
    scale, shift = np.array([1, 2, 3, 4, 0]), np.array([0, 1000, -9, 5, 7])
    # bags differ in their mean, and so do the parts of a bag
    means = [np.full((3000, 1), 2), np.linspace(-3, 3, 9000)[:, None], np.array([[50]])]
    matrices = [(rng.normal(loc=mean, size=(len(mean), 5)) * scale + shift).astype(dtype) for mean in means]
    mean, std = Bags(["a", "b", "c"], matrices).moments.mean_std(np.array([0, 1]))
    together = np.concatenate(matrices[:2]).astype(np.float64)
    np.testing.assert_allclose(mean, together.mean(axis=0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(std, together.std(axis=0), rtol=1e-4)
    assert std[4] == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_name_the_slide(value: float) -> None:
    matrices = _matrices()
    matrices[3][1, 2] = value
    with pytest.raises(BagError, match="'s3'"):
        _ = Bags([f"s{i}" for i in range(7)], matrices).moments


def test_an_empty_bag_names_the_slide() -> None:
    with pytest.raises(BagError, match="no valid tile in 1 slides: 'b'"):
        Bags(["a", "b"], [np.zeros((2, 3), np.float16), np.zeros((0, 3), np.float16)])


def test_bags_of_different_width_or_type_name_the_slide() -> None:
    for other in (np.zeros((2, 4), np.float16), np.zeros((2, 3), np.float32)):
        with pytest.raises(BagError, match="'b'"):
            Bags(["a", "b"], [np.zeros((2, 3), np.float16), other])


def test_the_entry_is_chosen_only_where_there_is_one() -> None:
    cohort = make_cohort()
    assert choose_entry(make_store(cohort)) == "tiny"
    several = make_store(cohort, recipes={"tiny": FEATURES, "uni2": FEATURES})
    assert choose_entry(several, "uni2") == "uni2"
    with pytest.raises(BagError, match="'tiny', 'uni2'"):
        choose_entry(several)
    with pytest.raises(BagError, match="did you mean 'uni2'"):
        choose_entry(several, "uni")
    with pytest.raises(BagError, match="mil extract"):
        choose_entry(make_store(cohort, recipes={}))


def test_bags_come_in_the_order_of_the_slides_and_missing_ones_are_named() -> None:
    cohort = make_cohort()
    store = make_store(cohort)
    bags = open_bags(store, cohort.slide_ids[::-1], "tiny")
    np.testing.assert_array_equal(bags.pack(np.array([0])).instances, store.slides[cohort.slide_ids[-1]])
    with pytest.raises(BagError, match="'nowhere'"):
        open_bags(store, ["slide 00", "nowhere"], "tiny")


def test_resident_bags_give_the_same_packs() -> None:
    rng = np.random.default_rng(0)
    matrices = [rng.normal(size=(n, 5)).astype(np.float16) for n in (4, 1, 7, 3)]
    bags = Bags([f"s{i}" for i in range(4)], matrices)
    resident = ResidentBags(bags, torch.device("cpu"))
    for members in ([2, 0], [1], [3, 2, 1, 0]):
        chosen = np.array(members)
        drawn = bags.draw(chosen, 3, seed=0, epoch=1)
        for rows in (None, drawn):
            one, other = bags.pack(chosen, rows), resident.pack(chosen, rows)
            assert torch.equal(one.instances, other.instances)
            assert one.instances.dtype == other.instances.dtype
            assert one.offsets.tolist() == other.offsets.tolist()
    assert [pack.bags.tolist() for pack in resident.packs(np.arange(4), 8)] == [
        pack.bags.tolist() for pack in bags.packs(np.arange(4), 8)
    ]
    np.testing.assert_array_equal(resident.moments.means, bags.moments.means)


def test_bags_stay_where_they_are_on_a_cpu() -> None:
    bags = Bags(["a"], [np.zeros((2, 3), np.float32)])
    assert place_bags(bags, torch.device("cpu")) is bags


def test_views_take_the_place_of_their_bag() -> None:
    matrices = [np.full((n, 2), n, np.float32) for n in (3, 2)]
    views = [[matrix + 10 * k for matrix in matrices] for k in (1, 2)]
    bags = Bags(["a", "b"], matrices, views=views)
    assert bags.n_views == 2
    members = np.array([1, 0])
    rows = {0: np.array([0, 2])}
    for packed in (bags, ResidentBags(bags, torch.device("cpu"))):
        found = packed.pack(members, rows, {0: 2, 1: 0})
        assert found.instances[:, 0].tolist() == [2, 2, 23, 23]
    broken = Bags(["a", "b"], matrices, views=[[matrices[0][:1], matrices[1]]])
    with pytest.raises(BagError, match=r"view 1 of slide 'a'.*--views again"):
        broken.pack(members, None, {0: 1})


def test_views_are_found_beside_their_entry() -> None:
    cohort = make_cohort(4)
    names = ("tiny", "tiny@view-1", "tiny@view-2", "tiny@view-10")
    store = make_store(cohort, recipes=dict.fromkeys(names, FEATURES))
    assert view_entries(store, "tiny") == ["tiny@view-1", "tiny@view-2", "tiny@view-10"]
    assert choose_entry(store) == "tiny"
    assert choose_entry(store, "tiny@view-2") == "tiny@view-2"
    assert open_bags(store, cohort.slide_ids, "tiny", views=True).n_views == 3
    with pytest.raises(BagError, match=r"views=sample.*--views 4"):
        open_bags(make_store(cohort), cohort.slide_ids, "tiny", views=True)
