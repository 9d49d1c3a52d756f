"""Slides that show the same picture under two patients, which would lie in training and in test.

A file that was copied under another name, or saved anew, has the features of the first. Nothing but the features tells
them, so this warns and refuses nothing: two tiny bags may be alike by chance.
"""

from collections.abc import Sequence

import numpy as np

from mil.arrays import FloatArray, IntArray
from mil.bags.bags import Moments

_NEAR = 0.05
"""Distance between the means of two bags, in units of that between bags drawn independently, below which they are
nearly equal: saving a picture anew changes less, another section of the same block changes more."""
_FEWEST_DIMS = 16
_BLOCK = 1024
_MOST_PAIRS = 5


def warn_of_duplicates(moments: Moments, slide_ids: Sequence[str], patient_ids: Sequence[str]) -> list[str]:
    """A warning that names pairs of (nearly) equal slides of different patients; none where there are none.

    Args:
        moments: of n bags.
        slide_ids: [n].
        patient_ids: [n].
    """
    pairs = [
        (one, two) for one, two in find_near(moments.means, moments.counts) if patient_ids[one] != patient_ids[two]
    ]
    if not pairs:
        return []
    told = "; ".join(
        f"{slide_ids[one]} of {patient_ids[one]} and {slide_ids[two]} of {patient_ids[two]}"
        for one, two in pairs[:_MOST_PAIRS]
    )
    more = f"; and {len(pairs) - _MOST_PAIRS} pairs more" if len(pairs) > _MOST_PAIRS else ""
    return [
        f"{len(pairs)} pair(s) of slides of different patients have equal or nearly equal features ({told}{more}): if "
        f"they are the same slide, the figures are too good; look at them, and give them one patient or leave one out"
    ]


def find_near(means: FloatArray, counts: IntArray) -> list[tuple[int, int]]:
    """Pairs of bags whose means are nearly the same and whose sizes differ by 5 % at most, by position.

    Args:
        means: [n, dim].
        counts: [n], instances of each.
    """
    n, dim = means.shape
    spread = means.std(axis=0)
    varying = spread > 0
    if not varying.any():
        return []
    scaled = ((means - means.mean(axis=0))[:, varying] / spread[varying]).astype(np.float32)
    limit = 2 * scaled.shape[1] * (_NEAR**2 if dim >= _FEWEST_DIMS else 0.0)
    squares = np.square(scaled).sum(axis=1)
    found = []
    for start in range(0, n, _BLOCK):
        block = scaled[start : start + _BLOCK]
        distances = squares[start : start + _BLOCK, None] + squares - 2 * block @ scaled.T
        # products of float32 leave a rest where the difference is none
        rows, columns = np.nonzero(distances <= limit + 1e-3 * (1 + squares))
        found += [(start + int(row), int(column)) for row, column in zip(rows, columns, strict=True)]
    return [
        (one, two)
        for one, two in found
        if one < two
        and abs(counts[one] - counts[two]) <= 0.05 * max(counts[one], counts[two])
        and np.square(scaled[one] - scaled[two]).sum() <= limit
    ]
