"""A synthetic cohort whose best possible AUROC is known, because its densities are.

Slides of class 0 hold background alone. In a slide of class c > 0 each instance is, with a small probability, a witness
of that class. With z standard normal of dimension d, orthonormal directions u_1 ... u_C-1 and a shift s of the whole
slide that is orthogonal to all of them (a stain, a scanner),

    background  x = M (z + s) + m              witness of class c  x = M (z + s + distance · u_c) + m

where M Mᵀ has eigenvalues proportional to j^-½ in random axes: a spectrum that falls, as that of embeddings does. As s
is orthogonal to the directions, t_i = Uᵀ M⁻¹ (x_i - m) holds all that the slide says of its class, and the posterior
is exact:

    log p(c | slide) = Σ_i log(1 - share + share · exp(distance · t_ic - distance² / 2)) + const

No head can be expected to rank slides better than this posterior; its AUROC on the same slides is the ceiling. (The
rounding to float16, which only loses information, is not in the density.)
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mil.statistics.metrics import auroc

N_CLASSES = 4
# deviation of a slide's own shift, in units of the deviation of instances
SLIDE_SHIFT = 0.3


@dataclass(frozen=True)
class Difficulty:
    """How many witnesses a slide has and how far they lie from the background.

    Attributes:
        name: names the rows of the results.
        share: probability that an instance is a witness.
        distance: of the witnesses from the background, in standard deviations.
    """

    name: str
    share: float
    distance: float


EASY = Difficulty("easy", share=0.02, distance=12.0)
HARD = Difficulty("hard", share=0.005, distance=18.0)


@dataclass(frozen=True)
class CohortSize:
    """Slides, instances per slide (log-uniform between the two, both included) and features."""

    slides: int
    fewest: int
    most: int
    dim: int


@dataclass(frozen=True, eq=False)
class CeilingCohort:
    """Bags with labels and the exact posterior of every class.

    Attributes:
        bags: n matrices float16 [n_instances, dim].
        labels: int64 [n], 0 to 3, equally frequent.
        posterior: float64 [n, 4], the exact probability of every class given the bag.
    """

    bags: list[npt.NDArray[np.float16]]
    labels: npt.NDArray[np.int64]
    posterior: npt.NDArray[np.float64]

    @property
    def slide_ids(self) -> list[str]:
        """``s0`` and so on."""
        return [f"s{index}" for index in range(len(self.bags))]

    @property
    def n_instances(self) -> int:
        """Of all bags together."""
        return sum(len(bag) for bag in self.bags)

    def ceiling(self, slides: npt.NDArray[np.int64]) -> float:
        """AUROC of the exact posterior on these slides: the most that any head can be expected to reach."""
        return float(auroc(self.labels[slides], self.posterior[slides])[0])


def draw_cohort(size: CohortSize, difficulty: Difficulty, seed: int, device: str = "cpu") -> CeilingCohort:
    """Draw a cohort; the same arguments give the same one (a GPU draws another than a CPU).

    Args:
        size: slides, instances and features.
        difficulty: of the witnesses.
        seed: of everything, axes and directions included.
        device: where to draw; the bags come back to the CPU.
    """
    rng, generator = np.random.default_rng(seed), torch.Generator(device).manual_seed(seed)
    axes, directions, mean = _space(size.dim, generator, device)
    labels = rng.permutation(np.arange(size.slides) % N_CLASSES)
    counts = np.exp(rng.uniform(np.log(size.fewest), np.log(size.most), size.slides)).round().astype(np.int64)
    bags, logits = [], []
    for label, count in zip(labels.tolist(), counts.tolist(), strict=True):
        whitened = _whitened_bag(count, label, directions, difficulty, generator)
        logits.append(_log_posterior(whitened @ directions, difficulty))
        bags.append((whitened @ axes + mean).half().cpu().numpy())
    return CeilingCohort(bags, labels, torch.stack(logits).softmax(dim=-1).numpy())


def _space(dim: int, generator: torch.Generator, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mᵀ [dim, dim], the directions U [dim, 3] and the mean [dim]; features have variance 1 on average."""
    rotation, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator, device=device))
    spectrum = torch.arange(1, dim + 1, device=device).float() ** -0.5
    axes = (spectrum / spectrum.mean()).sqrt()[:, None] * rotation
    directions, _ = torch.linalg.qr(torch.randn(dim, N_CLASSES - 1, generator=generator, device=device))
    return axes, directions, torch.randn(dim, generator=generator, device=device)


def _whitened_bag(
    count: int, label: int, directions: Tensor, difficulty: Difficulty, generator: torch.Generator
) -> Tensor:
    """One slide before M and m, float32 [count, dim]."""
    device, dim = directions.device, directions.shape[0]
    bag = torch.randn(count, dim, generator=generator, device=device)
    shift = SLIDE_SHIFT * torch.randn(dim, generator=generator, device=device)
    bag += shift - directions @ (directions.mT @ shift)
    witness = torch.rand(count, generator=generator, device=device) < difficulty.share
    if label > 0:
        bag += witness[:, None] * (difficulty.distance * directions[:, label - 1])
    return bag


def _log_posterior(along: Tensor, difficulty: Difficulty) -> Tensor:
    """Log posterior up to a constant, float64 [4] on the CPU, from the coordinates [count, 3] along the directions."""
    exponent = difficulty.distance * along.double() - difficulty.distance**2 / 2
    share = torch.tensor(difficulty.share, dtype=torch.float64, device=along.device)
    ratios = torch.logaddexp(torch.log1p(-share), share.log() + exponent).sum(dim=0).cpu()  # [3]
    return torch.cat([torch.zeros(1, dtype=torch.float64), ratios])
