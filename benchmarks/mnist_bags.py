"""MNIST-bags: does a bag of digits hold a nine? A LeNet is trained together with the head, from bag labels alone.

    python -m benchmarks.mnist_bags --data DATA_FOLDER/mnist

As in Ilse et al. 2018 and its published code (AMLab-Amsterdam/AttentionDeepMIL): bag sizes are drawn from a normal
distribution; half of the bags are drawn until they hold a nine, half without nines; Adam with learning rate 5e-4 and
weight decay 1e-4, one bag per step, 20 epochs, nothing chosen on a validation part or on the test bags. Reported is the
AUROC over 1,000 bags of test digits. Unlike there, the training digits are 10,000 of the 60,000.
"""

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from aggregators import Aggregator, create_aggregator
from benchmarks.machine import Result, print_results, write_results
from mil.statistics.metrics import auroc

TARGET = 9
WIDTH = 500
# mean and deviation of MNIST's training pixels, as the published code has them
PIXEL_MEAN, PIXEL_STD = 0.1307, 0.3081
# deviation of the bag size, by its mean
SIZE_STD = {10: 2.0, 50: 10.0}
HEADS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "abmil": ("abmil", {"gated": False, "embed_dim": None, "attention_dim": 128, "dropout": 0.0}),
    "gated abmil": ("abmil", {"gated": True, "embed_dim": None, "attention_dim": 128, "dropout": 0.0}),
    "mean": ("mean", {}),
    "max": ("max", {}),
}

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Digits:
    """Images float32 [n, 1, 28, 28], standardised, and their labels [n]."""

    images: Tensor
    labels: IntArray


@dataclass(frozen=True, eq=False)
class DigitBags:
    """Bags of digits: bag i holds the digits rows[offsets[i]:offsets[i + 1]].

    Attributes:
        rows: int64 [total], which digits.
        offsets: int64 [bags + 1].
        labels: [bags], 1 for a bag with a nine.
    """

    rows: IntArray
    offsets: IntArray
    labels: IntArray


def read_digits(path: Path) -> Digits:
    """Digits from an ``.npz`` of ``x`` uint8 [n, 28, 28] and ``y`` [n]."""
    with np.load(path) as file:
        pixels, labels = file["x"].reshape(-1, 1, 28, 28), file["y"].astype(np.int64)
    return Digits((torch.from_numpy(pixels).float() / 255 - PIXEL_MEAN) / PIXEL_STD, labels)


def draw_bags(labels: IntArray, count: int, mean_size: int, rng: np.random.Generator) -> DigitBags:
    """Draw bags with replacement; even ones hold the target, as often as chance has it, odd ones do not."""
    others = np.flatnonzero(labels != TARGET)
    bags: list[IntArray] = []
    while len(bags) < count:
        size = max(1, int(rng.normal(mean_size, SIZE_STD[mean_size])))
        positive = len(bags) % 2 == 0
        rows = rng.integers(len(labels), size=size) if positive else rng.choice(others, size)
        if not positive or (labels[rows] == TARGET).any():
            bags.append(rows)
    offsets = np.cumsum([0, *map(len, bags)], dtype=np.int64)
    return DigitBags(np.concatenate(bags), offsets, 1 - np.arange(count) % 2)


def create_encoder() -> nn.Sequential:
    """The LeNet of the published code: images [n, 1, 28, 28] to embeddings [n, 500]."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(50 * 4 * 4, WIDTH),
        nn.ReLU(),
    )


def train(digits: Digits, bags: DigitBags, title: str, epochs: int, seed: int) -> tuple[nn.Sequential, Aggregator]:
    """Train encoder and head together, one bag per step."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    name, keywords = HEADS[title]
    encoder, head = create_encoder(), create_aggregator(name, in_dim=WIDTH, n_classes=1, **keywords)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=5e-4, weight_decay=1e-4, fused=True)
    targets = torch.from_numpy(bags.labels).float()
    for _ in range(epochs):
        for bag in rng.permutation(len(bags.labels)).tolist():
            rows = bags.rows[bags.offsets[bag] : bags.offsets[bag + 1]]
            logits = head(encoder(digits.images[rows])).logits[0]
            loss = functional.binary_cross_entropy_with_logits(logits, targets[bag : bag + 1])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return encoder.eval(), head.eval()


@torch.inference_mode()
def auroc_on(encoder: nn.Sequential, head: Aggregator, digits: Digits, bags: DigitBags) -> float:
    """AUROC over bags. Each digit is embedded once, however many bags hold it."""
    embedded = torch.cat([encoder(images) for images in digits.images.split(1000)])
    probabilities = []
    for start in range(0, len(bags.labels), 100):
        offsets = bags.offsets[start : start + 101]
        rows = bags.rows[offsets[0] : offsets[-1]]
        logits = head(embedded[rows], torch.from_numpy(offsets - offsets[0])).logits
        probabilities.append(logits[:, 0].double().sigmoid())
    positive = torch.cat(probabilities).numpy()
    return float(auroc(bags.labels, np.stack([1 - positive, positive], axis=1))[0])


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Run every head on every size; the CSV is rewritten after each, so that a stopped run keeps what it has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(os.environ.get("TESSERA_DATA", "../shared/data")) / "mnist"
    parser.add_argument("--data", type=Path, default=data, help="folder of mnist_npm10k.npz and mnist_t10k.npz")
    parser.add_argument("--heads", nargs="+", default=list(HEADS), choices=list(HEADS))
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[10, 50], choices=sorted(SIZE_STD), help="mean bag size"
    )
    parser.add_argument("--bags", type=int, nargs="+", default=[50, 200], help="training bags")
    parser.add_argument("--test-bags", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="one seed of one epoch: does it run?")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/mnist_bags.csv"))
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.epochs = 1, 1
    torch.set_num_threads(1)
    training, test = (read_digits(options.data / f"mnist_{part}.npz") for part in ("npm10k", "t10k"))
    rows: list[Result] = []
    for size, count, title in product(options.sizes, options.bags, options.heads):
        areas, started = [], time.monotonic()
        for seed in range(options.seeds):
            bags = draw_bags(training.labels, count, size, np.random.default_rng((seed, 0)))
            test_bags = draw_bags(test.labels, options.test_bags, size, np.random.default_rng((seed, 1)))
            areas.append(auroc_on(*train(training, bags, title, options.epochs, seed), test, test_bags))
        rows.append(Result.of(f"{count} bags of {size}", f"AUROC, {title}", "", areas))
        print_results(rows[-1:])
        print(f"{time.monotonic() - started:.0f} s", flush=True)
        write_results(options.out, rows)
    return rows


if __name__ == "__main__":
    main()
