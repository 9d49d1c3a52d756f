"""Augmented views: a tile's bytes depend on recipe, view and key, and on nothing else; and they stay tissue."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from extract.backbones import views
from extract.backbones.views import GLASS, LEFT_OUT, MAX_STAIN, POLICIES, STAINS, augment, tile_key
from extract.errors import RecipeError
from extract.store.core.recipes import AUGMENT_POLICIES, AugmentRecipe
from tests.test_extract.small import tissue_image

SIDE_PX = 32
POLICIES_WITH_STRENGTH = [name for name in AUGMENT_POLICIES if name not in ("flip", "pathology")]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of torch's own would cost more than these small tiles."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tissue_tiles(count: int) -> Tensor:
    """Different tiles of tissue, uint8 [count, 32, 32, 3]."""
    image = tissue_image(SIDE_PX * count + 8, SIDE_PX + 8, margin=4)
    tiles = [image[4 : 4 + SIDE_PX, x : x + SIDE_PX] for x in range(4, 4 + SIDE_PX * count, SIDE_PX)]
    return torch.from_numpy(np.stack(tiles))


def views_of(tile: Tensor, recipe: AugmentRecipe, count: int) -> Tensor:
    """Views 0 to count - 1 of one tile."""
    return torch.cat([augment(tile[None], [7], recipe, view) for view in range(count)])


KEYS = [tile_key("slide", row) for row in range(12)]


@pytest.mark.parametrize("policy", AUGMENT_POLICIES)
def test_a_tile_does_not_depend_on_its_batch_or_its_place_in_it(policy: str):
    tiles, recipe = tissue_tiles(12), AugmentRecipe(policy, 0.7)
    whole = augment(tiles, KEYS, recipe, 3)
    order = [5, 0, 11, 3, 3, 8]
    assert torch.equal(augment(tiles[order], [KEYS[i] for i in order], recipe, 3), whole[order])
    for i in (0, 4, 11):
        assert torch.equal(augment(tiles[i : i + 1], KEYS[i : i + 1], recipe, 3)[0], whole[i])


@pytest.mark.parametrize("policy", AUGMENT_POLICIES)
def test_the_global_generator_is_neither_read_nor_moved(policy: str):
    tiles, recipe = tissue_tiles(12), AugmentRecipe(policy, 0.7)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(torch.cat([augment(tiles, KEYS, recipe, view) for view in range(4)]))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*results)


@pytest.mark.parametrize("policy", ["pathology", "randaugment"])
def test_threads_at_work_at_once_change_nothing(policy: str):
    tiles, recipe = tissue_tiles(12), AugmentRecipe(policy)
    alone = [augment(tiles, KEYS, recipe, view) for view in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda view: augment(tiles, KEYS, recipe, view), range(8)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("policy", AUGMENT_POLICIES)
def test_view_key_and_seed_each_change_the_draws(policy: str):
    tiles, recipe = tissue_tiles(12), AugmentRecipe(policy, 0.7)
    first = augment(tiles, KEYS, recipe, 0)
    assert not torch.equal(augment(tiles, KEYS, recipe, 1), first)
    assert not torch.equal(augment(tiles, [key + 1 for key in KEYS], recipe, 0), first)
    assert not torch.equal(augment(tiles, KEYS, replace(recipe, seed=1), 0), first)
    assert torch.equal(augment(tiles, KEYS, recipe, 0), first)


@pytest.mark.parametrize("policy", POLICIES_WITH_STRENGTH)
def test_strength_zero_leaves_every_pixel_as_it_was(policy: str):
    values = torch.arange(256, dtype=torch.uint8).repeat(12)[: SIDE_PX * SIDE_PX * 3]
    tile = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))]
    tile = tile.view(SIDE_PX, SIDE_PX, 3)
    assert torch.equal(views_of(tile, AugmentRecipe(policy, 0.0), 40), tile.expand(40, -1, -1, -1))


@pytest.mark.parametrize("policy", ["flip", "pathology"])
def test_flips_give_all_eight_poses_equally_often_and_have_no_strength(policy: str):
    tile = tissue_tiles(1)[0]
    poses = [torch.rot90(side, turns, (0, 1)) for side in (tile, tile.flip(1)) for turns in range(4)]
    views = views_of(tile, AugmentRecipe(policy, 0.0), 400)
    counts = [sum(torch.equal(view, pose) for view in views) for pose in poses]
    assert sum(counts) == 400
    assert min(counts) > 25  # 50 expected, of standard deviation 6.6


def test_more_strength_changes_more():
    tiles = tissue_tiles(12)
    for policy in POLICIES_WITH_STRENGTH:
        changes = []
        for strength in (0.1, 0.4, 1.0):
            recipe = AugmentRecipe(policy, strength)
            views = [augment(tiles, KEYS, recipe, view).float() for view in range(4)]
            changes.append(float(sum((view - tiles.float()).abs().mean() for view in views)))
        assert changes[0] < changes[1] < changes[2], policy


# ---------------------------------------------------------------- what a policy may do to tissue


@pytest.mark.parametrize("policy", ["colour", "hed", "blur"])
def test_light_stays_light_and_dark_stays_dark(policy: str):
    tile = tissue_tiles(1)[0]
    grey = tile.float().mean(-1).flatten()
    for view in views_of(tile, AugmentRecipe(policy, 1.0), 40):
        changed = view.float().mean(-1).flatten()
        assert np.corrcoef(grey, changed)[0, 1] > 0.6
        assert 60 < changed.mean() < 250


@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment"])
def test_no_operation_turns_bright_tissue_black_or_shows_black_corners(policy: str):
    """Solarize and Equalize would give values below 46, a corner filled with nothing 0."""
    tile = torch.randint(210, 256, (SIDE_PX, SIDE_PX, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    views = views_of(tile, AugmentRecipe(policy, 1.0), 300)
    assert int(views.min()) > 50
    corners = views[:, 0, 0].eq(GLASS).all(-1)
    assert corners.any()


def test_what_is_left_out_is_still_what_torchvision_would_draw():
    assert set(LEFT_OUT) < set(v2.RandAugment._AUGMENTATION_SPACE)
    assert set(LEFT_OUT) < set(v2.TrivialAugmentWide._AUGMENTATION_SPACE)


def test_the_stains_are_inverted_once_and_not_per_tile(monkeypatch: pytest.MonkeyPatch):
    inverted = []
    inverse = torch.linalg.inv
    monkeypatch.setattr(torch.linalg, "inv", lambda matrix: inverted.append(1) or inverse(matrix))
    views._stain_matrices.cache_clear()
    augment(tissue_tiles(12), KEYS, AugmentRecipe("hed", 1.0), 0)
    assert len(inverted) == 1


def test_hed_scales_and_shifts_each_stain_by_itself():
    """In the space of the stains a view is a straight line per stain, within reach, as the paper writes it."""
    stains = np.array(STAINS) / np.linalg.norm(STAINS, axis=1, keepdims=True)
    concentrations = np.random.default_rng(0).uniform(0.3, 0.7, (SIDE_PX * SIDE_PX, 3))
    values = np.exp(-concentrations @ stains) * 256 - 1
    tile = torch.from_numpy(values.round().astype(np.uint8)).view(SIDE_PX, SIDE_PX, 3)
    scales, shifts = [], []
    for view in views_of(tile, AugmentRecipe("hed", 1.0), 20):
        changed = -np.log((view.numpy().reshape(-1, 3) + 1.0) / 256) @ np.linalg.inv(stains)
        lines = np.array([np.polyfit(concentrations[:, i], changed[:, i], 1) for i in range(3)])
        straight = concentrations * lines[:, 0] + lines[:, 1]
        assert np.abs(changed - straight).mean() < 0.02  # rounding to bytes
        scales.append(lines[:, 0] - 1)
        shifts.append(lines[:, 1])
    for drawn in (np.array(scales), np.array(shifts)):
        assert np.abs(drawn).max() < MAX_STAIN + 0.02
        assert np.abs(drawn).max() > 0.7 * MAX_STAIN
        # the three stains are drawn apart
        assert np.abs(np.corrcoef(drawn.T) - np.eye(3)).max() < 0.9


def test_blur_keeps_the_mean_and_takes_contrast():
    tile = tissue_tiles(1)[0]
    views = views_of(tile, AugmentRecipe("blur", 1.0), 20).float()
    assert float((views.mean((1, 2)) - tile.float().mean((0, 1))).abs().max()) < 3
    assert float(views.std((1, 2)).min()) < 0.8 * float(tile.float().std((0, 1)).min())


# ---------------------------------------------------------------- names, keys, input


def test_the_recipes_names_are_the_policies():
    assert set(POLICIES) == set(AUGMENT_POLICIES)


def test_keys_are_64_bits_differ_by_slide_and_row_and_are_pinned():
    keys = {tile_key(slide, row) for slide in ("a", "b", "a1") for row in range(200)}
    assert len(keys) == 600
    assert all(0 <= key < 1 << 64 for key in keys)
    assert tile_key("slide", 0) == 1694037190807615178


def test_draws_are_pinned():
    """Another value means other views under the same recipe: raise `AugmentRecipe.revision` and say so."""
    tile = torch.arange(8 * 8 * 3, dtype=torch.uint8).view(8, 8, 3)
    changed = augment(tile.expand(12, -1, -1, -1), KEYS, AugmentRecipe("flip"), 0)
    assert hashlib.sha256(changed.numpy().tobytes()).hexdigest()[:16] == "d5e81abb3f516345"


@pytest.mark.parametrize(
    ("tiles", "keys"),
    [
        (torch.zeros(2, 8, 8, 3), [1, 2]),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), [1]),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), [1, 2]),
        (torch.zeros(1, 8, 9, 3, dtype=torch.uint8), [1]),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), []),
    ],
    ids=["float", "keys", "channels first", "oblong", "one tile"],
)
def test_what_is_not_a_batch_of_tiles_is_refused(tiles: Tensor, keys: list[int]):
    with pytest.raises(RecipeError, match=r"got tiles .* → expected uint8 \[n, s, s, 3\]"):
        augment(tiles, keys, AugmentRecipe(), 0)


def test_no_tiles_give_no_tiles():
    empty = torch.zeros(0, 8, 8, 3, dtype=torch.uint8)
    assert augment(empty, [], AugmentRecipe(), 0).shape == empty.shape
