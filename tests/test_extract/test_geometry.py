"""Frames, levels, grids and the area filter, against brute force in float64."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extract.errors import ScaleError
from extract.geometry import (
    SAME_SCALE_TOLERANCE,
    Grid,
    ReadPlan,
    area_mm2,
    area_weights,
    context_coords,
    magnification_to_mpp,
    plan_context,
    plan_read,
    resample_area,
    tile_grid,
)

PYRAMIDS = [
    (1.0,),
    (1.0, 2.0, 4.0),
    (1.0, 3.9998, 15.997),
    (1.0, 2.0005, 4.0154, 8.05),
    (1.0, 4.0001, 16.0021, 32.012),
]
NATIVE = [0.2425, 0.25, 0.44, 0.499, 0.62005]


def brute_area(pixels: np.ndarray, length: float, n_out: int) -> np.ndarray:
    """Mean over every output pixel's area in float64, one pixel at a time."""
    weights = np.zeros((n_out, pixels.shape[0]))
    for j in range(n_out):
        left, right = j * length / n_out, (j + 1) * length / n_out
        for i in range(pixels.shape[0]):
            weights[j, i] = max(0.0, min(right, i + 1) - max(left, i))
    weights /= weights.sum(axis=1, keepdims=True)
    return np.einsum("ai,bj,ijc->abc", weights, weights, pixels.astype(np.float64))


def test_magnification_and_area_use_the_fields_units():
    assert magnification_to_mpp(20) == 0.5
    assert magnification_to_mpp(40) == 0.25
    assert area_mm2(4_000_000, 0.5) == pytest.approx(1.0)


# ---------------------------------------------------------------- area resampling


@settings(max_examples=120, deadline=None)
@given(n_out=st.integers(1, 24), ratio=st.floats(0.3, 6.0), seed=st.integers(0, 99))
def test_area_resampling_is_the_mean_over_each_pixels_area(n_out: int, ratio: float, seed: int):
    length = n_out * ratio
    side = max(math.ceil(length - 1e-6), 1)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    exact = brute_area(pixels, length, n_out)
    got = resample_area(pixels, length, n_out)
    assert got.shape == (n_out, n_out, 3)
    assert got.dtype == np.uint8
    # rounded half up: never further than half a grey level from the exact mean
    assert np.abs(got - exact).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("factor", [2, 3, 5])
def test_whole_factors_give_the_block_mean(factor: int):
    pixels = np.random.default_rng(factor).integers(0, 256, (7 * factor, 7 * factor, 3), dtype=np.uint8)
    blocks = pixels.reshape(7, factor, 7, factor, 3).astype(np.int64).sum(axis=(1, 3))
    expected = (2 * blocks + factor**2) // (2 * factor**2)
    assert np.abs(resample_area(pixels, 7.0 * factor, 7).astype(int) - expected).max() == 0


def tap_by_tap(pixels: np.ndarray, length: float, n_out: int) -> np.ndarray:
    """The definition in float32: rows first, then columns, one tap after another."""
    mixed = pixels
    for axis in (0, 1):
        index, weight = area_weights(length, n_out, pixels.shape[axis])
        shape = (n_out, 1, 1) if axis == 0 else (1, n_out, 1)
        mixed = sum(np.take(mixed, i, axis) * w.reshape(shape) for i, w in zip(index, weight, strict=True))
    return (mixed + np.float32(0.5)).astype(np.uint8)


@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 5, 7, 8, 9, 16, 0.7, 1.613, 2.0001, 3.9998])
def test_the_fast_ways_give_the_pixels_of_the_definition(ratio: float):
    length = 40 * ratio
    side = math.ceil(length - 1e-6)
    for seed in range(5):
        # a larger image, as where a region is rounded up
        pixels = np.random.default_rng(seed).integers(0, 256, (side + seed, side + 2 * seed, 3), dtype=np.uint8)
        got = resample_area(pixels, length, 40)
        assert np.array_equal(got, tap_by_tap(pixels, length, 40))
        assert got.flags.c_contiguous


@pytest.mark.parametrize("factor", [2, 4, 6, 10, 12, 16])
def test_a_tie_is_rounded_up(factor: int):
    """Blocks whose sum is n and a half times the area; float32 taps get a few wrong from 6 on. No sum overflows."""
    pixels = np.zeros((8 * factor, 8 * factor, 3), dtype=np.uint8)
    blocks = pixels.reshape(8, factor, 8, factor, 3)
    blocks[:, : factor // 2] = 201
    blocks[:, factor // 2 :] = 200
    assert (resample_area(pixels, 8.0 * factor, 8) == 201).all()
    pixels[:] = 255
    assert (resample_area(pixels, 8.0 * factor, 8) == 255).all()


@settings(max_examples=60, deadline=None)
@given(value=st.integers(0, 255), n_out=st.integers(1, 300), ratio=st.floats(0.4, 9.0))
def test_a_constant_image_stays_constant(value: int, n_out: int, ratio: float):
    side = math.ceil(n_out * ratio - 1e-6)
    pixels = np.full((max(side, 1), max(side, 1), 3), value, dtype=np.uint8)
    assert (resample_area(pixels, n_out * ratio, n_out) == value).all()


def test_what_lies_beyond_the_length_does_not_leak_in():
    pixels = np.zeros((12, 12, 3), dtype=np.uint8)
    pixels[10:] = pixels[:, 10:] = 255
    assert resample_area(pixels, 10.0, 4).max() == 0
    assert resample_area(pixels, 10.5, 4)[-1, -1, 0] > 0


# ---------------------------------------------------------------- the level that is read


@pytest.mark.parametrize("downsamples", PYRAMIDS)
@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.62, 1.0, 2.0, 4.0, 29.0])
def test_the_coarsest_level_that_is_fine_enough_is_read(native: float, downsamples: tuple[float, ...], mpp: float):
    levels = [native * downsample for downsample in downsamples]
    same = [i for i, level in enumerate(levels) if abs(level / mpp - 1) <= SAME_SCALE_TOLERANCE]
    if not same and levels[0] > mpp:
        with pytest.raises(ScaleError, match="upsampling"):
            plan_read(native, downsamples, mpp, 224)
        return
    plan = plan_read(native, downsamples, mpp, 224)
    if same:
        assert plan.level in same
        assert not plan.resampled
        assert plan.tile_level == 224
        assert plan.achieved_mpp == levels[plan.level]
    else:
        assert levels[plan.level] < mpp
        assert all(level > mpp for level in levels[plan.level + 1 :])
        assert plan.resampled
        assert plan.achieved_mpp == mpp
    assert plan.downsample == downsamples[plan.level]
    # one tile is the same micrometres in all three frames
    micrometres = 224 * plan.achieved_mpp
    assert plan.tile_l0 * native == pytest.approx(micrometres, rel=1e-12)
    assert plan.tile_level * levels[plan.level] == pytest.approx(micrometres, rel=1e-12)


def test_within_one_percent_is_read_as_it_is_and_beyond_is_resampled():
    assert not plan_read(0.62005, (1.0,), 0.62, 224).resampled
    assert plan_read(0.62005, (1.0,), 0.62, 224).tile_l0 == 224
    assert not plan_read(0.4951, (1.0,), 0.5, 224).resampled
    assert not plan_read(0.5049, (1.0,), 0.5, 224).resampled
    assert plan_read(0.4949, (1.0,), 0.5, 224).resampled
    with pytest.raises(ScaleError):
        plan_read(0.5051, (1.0,), 0.5, 224)


def test_0_44_is_not_tiled_as_if_it_were_0_5():
    plan = plan_read(0.44, (1.0, 4.0), 0.5, 224)
    assert plan.level == 0
    assert plan.tile_level == pytest.approx(224 * 0.5 / 0.44)


def test_a_downsample_is_not_cut_to_an_integer():
    plan = plan_read(0.25, (1.0, 3.9998), 1.0, 224)
    assert plan.level == 1
    assert plan.tile_l0 == pytest.approx(224 * 3.9998)


def test_upsampling_is_refused_unless_asked_for():
    with pytest.raises(ScaleError, match=r"0\.62005.*allow-upsampling"):
        plan_read(0.62005, (1.0, 2.0), 0.25, 224)
    plan = plan_read(0.62005, (1.0, 2.0), 0.25, 224, allow_upsampling=True)
    assert plan.level == 0
    assert plan.tile_level < 224
    assert plan.achieved_mpp == 0.25


def test_native_reads_level_0_even_without_mpp():
    plan = plan_read(None, (1.0, 4.0), None, 100)
    assert (plan.level, plan.tile_l0, plan.achieved_mpp, plan.resampled) == (0, 100.0, None, False)
    assert plan_read(0.3, (1.0, 4.0), None, 100).achieved_mpp == 0.3


# ---------------------------------------------------------------- the grid


@st.composite
def grids(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int], ReadPlan, int]:
    """An origin, a size, a read plan and an overlap."""
    native = draw(st.sampled_from(NATIVE))
    pyramid = draw(st.sampled_from(PYRAMIDS))
    mpp = draw(st.sampled_from([0.25, 0.5, 0.62, 1.0, 2.0]))
    tile_px = draw(st.integers(16, 256))
    plan = plan_read(native, pyramid, mpp, tile_px, allow_upsampling=True)
    smallest = math.ceil(plan.tile_l0 + 2 * plan.downsample)
    size = tuple(draw(st.integers(smallest, smallest + 6000)) for _ in range(2))
    origin = tuple(draw(st.integers(0, 5000)) for _ in range(2))
    return origin, size, plan, draw(st.integers(0, tile_px // 2))  # type: ignore[return-value]


@settings(max_examples=200, deadline=None)
@given(grids())
def test_a_shifted_grid_covers_everything_within_bounds(case: tuple):
    origin, size, plan, overlap = case
    grid = tile_grid(origin, size, plan, overlap)
    level_px = plan.downsample + 1.0
    for axis, positions in enumerate((grid.x_l0, grid.y_l0)):
        assert (np.diff(positions) > 0).all()
        assert positions[0] >= origin[axis] - 0.5
        assert positions[0] < origin[axis] + level_px
        end = origin[axis] + size[axis]
        assert positions[-1] + plan.tile_l0 <= end + 0.5 * level_px
        assert positions[-1] + plan.tile_l0 > end - level_px
        # neighbours touch: at most the rounding to the level's pixels lies between them
        assert (np.diff(positions) <= plan.tile_l0 + level_px).all()


@settings(max_examples=200, deadline=None)
@given(grids())
def test_origins_never_drift_and_dropping_only_drops(case: tuple):
    origin, size, plan, overlap = case
    shift = tile_grid(origin, size, plan, overlap, "shift")
    drop = tile_grid(origin, size, plan, overlap, "drop")
    stride_l0 = (plan.tile_px - overlap) * plan.tile_l0 / plan.tile_px
    assert not drop.x_shifted
    assert not drop.y_shifted
    for positions, dropped, shifted in (
        (shift.x_l0, drop.x_l0, shift.x_shifted),
        (shift.y_l0, drop.y_l0, shift.y_shifted),
    ):
        assert np.array_equal(dropped, positions[:-1] if shifted else positions)
        ideal = positions[0] + np.arange(len(dropped)) * stride_l0
        # half a pixel of the level, half a pixel of level 0; the last one may step back into the slide
        assert (np.abs(dropped - ideal)[:-1] <= 0.5 * plan.downsample + 1.0).all()
        assert abs(dropped[-1] - ideal[-1]) <= 1.5 * plan.downsample + 1.0


@pytest.mark.parametrize(("native", "downsample"), [(0.2425, 3.9998), (0.44, 2.0005), (0.62005, 1.0), (0.25, 4.0154)])
def test_no_rounding_accumulates_over_a_slide_of_100000_px(native: float, downsample: float):
    plan = plan_read(native, (1.0, downsample) if downsample > 1 else (1.0,), native * downsample * 1.137, 224)
    grid = tile_grid((0, 0), (100_000, 100_000), plan, edge="drop")
    ideal = np.arange(len(grid.x_l0)) * plan.tile_l0
    assert len(grid.x_l0) == math.floor(100_000 / plan.tile_l0)
    assert np.abs(grid.x_l0 - ideal).max() <= 0.5 * plan.downsample + 0.5


def test_coords_are_row_major_int32_and_unique():
    grid = tile_grid((7, 11), (775, 522), plan_read(0.62005, (1.0,), 0.62, 224))
    coords = grid.coords_l0()
    assert coords.dtype == np.int32
    assert coords.shape == (4 * 3, 2)
    order = np.lexsort((coords[:, 0], coords[:, 1]))
    assert np.array_equal(order, np.arange(len(coords)))
    assert len(np.unique(coords, axis=0)) == len(coords)


def test_the_field_of_775_by_522_shifts_its_last_row_and_column_inwards():
    plan = plan_read(0.62005, (1.0,), 0.62, 224)
    shift = tile_grid((0, 0), (775, 522), plan)
    assert shift.x_l0.tolist() == [0, 224, 448, 775 - 224]
    assert shift.y_l0.tolist() == [0, 224, 522 - 224]
    assert (shift.x_shifted, shift.y_shifted) == (True, True)
    drop = tile_grid((0, 0), (775, 522), plan, edge="drop")
    assert drop.x_l0.tolist() == [0, 224, 448]


def test_nothing_is_shifted_where_tiles_fit_exactly():
    grid = tile_grid((0, 0), (448, 672), plan_read(0.5, (1.0,), 0.5, 224))
    assert (grid.x_l0.tolist(), grid.x_shifted, grid.y_shifted) == ([0, 224], False, False)


def test_the_grid_starts_at_the_origin_of_the_bounds():
    plan = plan_read(0.5, (1.0,), 0.5, 100)
    here, there = tile_grid((0, 0), (950, 640), plan, 10), tile_grid((313, 77), (950, 640), plan, 10)
    assert np.array_equal(here.coords_l0() + np.array([313, 77]), there.coords_l0())


def test_overlap_repeats_pixels():
    grid = tile_grid((0, 0), (400, 100), plan_read(0.5, (1.0,), 0.5, 100), overlap_px=25)
    assert grid.x_l0.tolist() == [0, 75, 150, 225, 300]


@pytest.mark.parametrize("size", [(99, 500), (500, 99)])
def test_a_slide_smaller_than_a_tile_is_an_error_that_says_so(size: tuple[int, int]):
    with pytest.raises(ScaleError, match="smaller --tile-px"):
        tile_grid((0, 0), size, plan_read(0.5, (1.0,), 0.5, 100))


def test_grid_of_one_tile():
    grid = tile_grid((0, 0), (100, 100), plan_read(0.5, (1.0,), 0.5, 100))
    assert isinstance(grid, Grid)
    assert grid.coords_l0().tolist() == [[0, 0]]


# ---------------------------------------------------------------- gap and shift


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, int, int, float, int, int, str]:
    """Along one axis: origin, size, tile size, downsample, stride - tile, shift, edge; all at the level's scale."""
    tile_px = draw(st.integers(4, 60))
    between = draw(st.integers(-tile_px // 2, tile_px))
    shift = draw(st.integers(0, tile_px + between - 1))
    origin, size = draw(st.integers(0, 500)), draw(st.integers(2 * tile_px, 900))
    edge = draw(st.sampled_from(["shift", "drop"]))
    return origin, size, tile_px, draw(st.sampled_from([1.0, 2.0, 4.0])), between, shift, edge


def lay(layout: tuple) -> tuple[Grid, np.ndarray, int, int]:
    """The grid of a layout, its columns, and the first and last place that a tile may have."""
    origin, size, tile_px, downsample, between, shift, edge = layout
    plan = ReadPlan(0, downsample, tile_px, float(tile_px), tile_px * downsample, 0.5, 0.5, 0.5)
    whole = int(downsample)
    corner, extent = (origin * whole, 0), (size * whole, tile_px * whole)
    grid = tile_grid(corner, extent, plan, max(-between, 0), edge, max(between, 0), (shift, 0))
    return grid, grid.x_l0 // whole, origin, origin + size - tile_px


@settings(max_examples=300, deadline=None)
@given(layouts())
def test_tiles_lie_inside_on_whole_pixels_of_the_level(layout: tuple):
    grid, columns, first, last = lay(layout)
    assert (grid.x_l0 % int(layout[3]) == 0).all()
    assert columns.min() >= first
    assert columns.max() <= last
    assert (np.diff(columns) > 0).all()


@settings(max_examples=300, deadline=None)
@given(layouts())
def test_no_two_tiles_overlap_more_than_asked_unless_moved_inwards(layout: tuple):
    grid, columns, _, _ = lay(layout)
    _, _, tile_px, _, between, _, edge = layout
    apart = np.diff(columns)
    kept = apart[int(grid.x_first_shifted) : len(apart) - int(grid.x_shifted)]
    assert (kept == tile_px + between).all()
    if between > 0:
        assert (apart >= tile_px).all()
    if edge == "drop":
        assert not grid.x_first_shifted
        assert not grid.x_shifted


@settings(max_examples=300, deadline=None)
@given(layouts())
def test_every_pixel_is_covered_without_a_gap_when_the_edges_shift(layout: tuple):
    origin, size, tile_px, downsample, between, shift, _ = layout
    _, columns, first, _ = lay((origin, size, tile_px, downsample, min(between, 0), shift % (tile_px // 2), "shift"))
    covered = np.zeros(size, dtype=bool)
    for column in columns - first:
        covered[column : column + tile_px] = True
    assert covered.all()


@settings(max_examples=200, deadline=None)
@given(layouts())
def test_a_shift_moves_the_whole_grid(layout: tuple):
    origin, size, tile_px, downsample, between, shift, _ = layout
    still = lay((origin, size, tile_px, downsample, between, 0, "drop"))[1]
    _, moved, _, last = lay((origin, size, tile_px, downsample, between, shift, "drop"))
    shift = min(shift, last - origin)
    assert np.array_equal(moved, still[: len(moved)] + shift)
    assert len(still) - len(moved) in (0, 1)


def test_a_gap_is_left_between_tiles_and_a_shift_at_the_start():
    plan = plan_read(0.5, (1.0,), 0.5, 100)
    assert tile_grid((0, 0), (499, 100), plan, gap_px=50).x_l0.tolist() == [0, 150, 300]
    # one more tile fits beside the last, and then with a part of the gap
    assert tile_grid((0, 0), (500, 100), plan, gap_px=50).x_l0.tolist() == [0, 150, 300, 400]
    assert tile_grid((0, 0), (549, 100), plan, gap_px=50).x_l0.tolist() == [0, 150, 300, 449]
    grid = tile_grid((0, 0), (430, 100), plan, shift_px=(30, 7))
    assert grid.x_l0.tolist() == [0, 30, 130, 230, 330]
    assert (grid.x_first_shifted, grid.x_shifted) == (True, False)
    # no room for a shift downwards
    assert grid.y_l0.tolist() == [0]
    assert tile_grid((0, 0), (430, 100), plan, edge="drop", shift_px=(40, 0)).x_l0.tolist() == [40, 140, 240]


# ---------------------------------------------------------------- context tiles


@st.composite
def contexts(draw: st.DrawFn) -> tuple[ReadPlan, ReadPlan, np.ndarray]:
    """A plan, a coarser plan, and corners of tiles."""
    native, pyramid = draw(st.sampled_from(NATIVE)), draw(st.sampled_from(PYRAMIDS))
    plan = plan_read(native, pyramid, draw(st.sampled_from([None, 0.62, 1.0])), draw(st.integers(16, 256)))
    context = plan_context(plan, pyramid, plan.achieved_mpp * draw(st.floats(1.1, 12)))
    seed = draw(st.integers(0, 99))
    return plan, context, np.random.default_rng(seed).integers(0, 90_000, (20, 2), dtype=np.int32)


@settings(max_examples=200, deadline=None)
@given(contexts())
def test_context_tiles_have_the_centres_of_the_tiles_and_hold_them(case: tuple):
    plan, context, coords = case
    corners = context_coords(coords, plan, context)
    assert corners.dtype == np.int32
    off = np.abs((corners + context.tile_l0 / 2) - (coords + plan.tile_l0 / 2))
    whole = context.downsample.is_integer()
    assert off.max() <= 0.5 * context.downsample + (0.0 if whole else 0.5) + 1e-6
    if whole:
        assert (corners % int(context.downsample) == 0).all()
    # nested: a tile sticks out of its context by the rounding of the centre at most
    assert (corners <= coords + off.max() + 1e-6).all()
    assert (corners + context.tile_l0 >= coords + plan.tile_l0 - off.max() - 1e-6).all()


def test_context_is_read_by_the_rules_of_plan_read():
    pyramid = (1.0, 4.0, 16.0)
    plan = plan_read(0.25, pyramid, 0.5, 224)
    assert plan_context(plan, pyramid, 2.0) == plan_read(0.25, pyramid, 2.0, 224)
    assert plan_context(plan, pyramid, 1.0).level == 1
    # a context at the slide's corner sticks out of it
    corners = context_coords(np.array([[0, 0]]), plan, plan_context(plan, pyramid, 2.0))
    assert corners.tolist() == [[448 // 2 - 1792 // 2] * 2]


def test_a_context_that_is_not_coarser_is_refused():
    plan = plan_read(0.25, (1.0, 4.0), 0.5, 224)
    for mpp in (0.5, 0.25):
        with pytest.raises(ScaleError, match=r"coarser than the tiles' 0\.5"):
            plan_context(plan, (1.0, 4.0), mpp)
    with pytest.raises(ScaleError, match="scale is unknown"):
        plan_context(plan_read(None, (1.0,), None, 224), (1.0,), 2.0)
