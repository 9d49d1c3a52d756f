"""Where a bag's instances lie: cells of the bag's own grid, and the 2-D sine-cosine code of cells."""

import torch
from torch import Tensor

from aggregators.errors import BagInputError, require
from aggregators.segment import Segments

_LONGEST = 10_000.0  # ratio of the longest to the shortest wavelength, as for words


def require_coords(coords: Tensor | None, head: str) -> Tensor:
    """Returns the coords, or says that the head cannot do without.

    Raises:
        BagInputError: coords is None.
    """
    if coords is None:
        raise BagInputError(
            f"got no coords → expected [total, 2] in level-0 px, as {head} encodes positions → pass the tiles' "
            "coordinates packed like the instances, or build the head with positions='none'"
        )
    return coords


def grid_cells(coords: Tensor, segments: Segments) -> Tensor:
    """Turns coordinates into columns and rows of each bag's own grid: (coords - origin_b) / step_b.

    The origin is the bag's smallest x and y, the step the smallest distance between two of its columns or two of
    its rows. Cells are hence the same wherever the slide's bounds start, at any tile size and any level-0 resolution,
    and whole numbers for tiles on a grid. A bag of one column and one row has step 1. A subset of a bag's tiles has
    the same cells, but for the origin, as long as two of them are neighbours.

    Shapes: coords [total, 2], level-0 px → [total, 2], float64.

    Example:
        >>> grid_cells(torch.tensor([[1000, 400], [1512, 400], [1000, 1424], [7, 7]]), Segments((3, 1))).tolist()
        [[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]
    """
    return torch.cat([_bag_cells(bag) for bag in segments.split(coords.double())])


def sincos_code(cells: Tensor, dim: int) -> Tensor:
    """Encodes columns and rows: concat of sin(c ω_i), cos(c ω_i), sin(r ω_i), cos(r ω_i) with ω_i = 10000^(-i / k).

    Shapes: cells [total, 2] → [total, dim], float64, with k = dim / 4 frequencies i = 0 … k - 1.

    Raises:
        HeadConfigError: dim is not a multiple of 4.

    References:
        Vaswani et al., Attention is all you need, NeurIPS 2017, once for x and once for y as in Chen, Xie, He, An
        empirical study of training self-supervised vision transformers, ICCV 2021.

    Example:
        >>> sincos_code(torch.zeros(1, 2), 4).tolist()
        [[0.0, 1.0, 0.0, 1.0]]
    """
    require(dim % 4 == 0, f"got width {dim} → expected a multiple of 4 for sine-cosine positions → try 256")
    count = dim // 4
    exponents = torch.arange(count, dtype=torch.float64, device=cells.device) / count
    angles = cells.double().unsqueeze(2) * _LONGEST**-exponents  # [total, 2, k]
    return torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1)


def _bag_cells(coords: Tensor) -> Tensor:
    steps = torch.cat([_steps(axis) for axis in coords.unbind(1)])
    step = steps.min() if steps.shape[0] else coords.new_ones(())
    return (coords - coords.amin(0)) / step


def _steps(axis: Tensor) -> Tensor:
    gaps = axis.sort().values.diff()
    return gaps[gaps > 0]
