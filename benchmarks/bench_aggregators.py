"""Forward and backward of every registered head over bag sizes, beside torchmil's.

    python -m benchmarks.bench_aggregators
    python -m benchmarks.bench_aggregators --device cuda

A step is one forward of a packed batch of random float32 bags in training mode, cross-entropy plus the head's own loss,
and one backward. Small bags travel several at once (16 of 100, 8 of 1,000); torchmil's heads get the same bags as one
padded tensor with its mask. As the defaults of the two are different heads, one more row is our ABMIL in the shape of
theirs: no projection, no gate, no dropout. The first step of every row is not timed. Steps that would exceed the time
limit, judged by the size before, are left out with what they were expected to take. Heads with full attention stop at
20,000 instances on a CPU. Memory is the peak of the process above what it held before the step, after free memory was
given back to the system; on a GPU that of torch's allocations.
"""

import argparse
import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from aggregators import create_aggregator, list_aggregators
from aggregators.registry import aggregator_record
from benchmarks import torchmil_peer
from benchmarks.machine import Result, print_results, write_results
from mil.bags.devices import PeakMemory, resolve_device

SIZES = (100, 1_000, 10_000, 100_000)
N_CLASSES = 4
# bags of these sizes travel this many at once, others alone
BAGS = {100: 16, 1_000: 8}
QUADRATIC_LIMIT = 20_000
TORCHMIL_SHAPE = {"embed_dim": None, "attention_dim": 128, "gated": False, "dropout": 0.0}

Step = Callable[[], None]


@dataclass(frozen=True)
class Subject:
    """A head to be timed.

    Attributes:
        name: names its rows.
        quadratic: time grows with the square of a bag's size.
        make_step: from (bag size, bags) to one forward and backward.
    """

    name: str
    quadratic: bool
    make_step: Callable[[int, int], Step]


def subjects(dim: int, device: torch.device) -> list[Subject]:
    """Every registered head, and torchmil's where it is installed."""
    found = []
    for name in list_aggregators():
        quadratic = aggregator_record(name).cost == "quadratic"
        found.append(Subject(name, quadratic, lambda size, bags, name=name: _our_step(name, size, bags, dim, device)))
    found.append(
        Subject(
            "abmil in torchmil's shape",
            False,
            lambda size, bags: _our_step("abmil", size, bags, dim, device, **TORCHMIL_SHAPE),
        )
    )
    heads: tuple[torchmil_peer.Head, ...] = ("abmil", "transformer") if torchmil_peer.is_installed() else ()
    for head in heads:
        step = lambda size, bags, head=head: _torchmil_step(head, size, bags, dim, device)  # noqa: E731
        found.append(Subject(f"torchmil {head}", head == "transformer", step))
    return found


def _our_step(name: str, size: int, bags: int, dim: int, device: torch.device, **keywords: Any) -> Step:
    head = create_aggregator(name, in_dim=dim, n_classes=N_CLASSES, **keywords).to(device).train()
    instances, targets = _batch(size, bags, dim, device)
    offsets = torch.arange(bags + 1) * size

    def step() -> None:
        output = head(instances, offsets)
        loss = functional.cross_entropy(output.logits, targets) + head.auxiliary_loss(output, targets, offsets)
        head.zero_grad(set_to_none=True)
        loss.backward()

    return step


def _torchmil_step(head: torchmil_peer.Head, size: int, bags: int, dim: int, device: torch.device) -> Step:
    model = torchmil_peer.create_head(head, dim, N_CLASSES).to(device).train()
    instances, targets = _batch(size, bags, dim, device)
    padded = instances.view(bags, size, dim)
    mask = torch.ones(bags, size, dtype=torch.uint8, device=device)

    def step() -> None:
        loss = functional.cross_entropy(model(padded, mask), targets)
        model.zero_grad(set_to_none=True)
        loss.backward()

    return step


def _batch(size: int, bags: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    instances = torch.randn(bags * size, dim, generator=generator, device=device)
    return instances, torch.arange(bags, device=device) % N_CLASSES


def time_step(step: Step, repeats: int, device: torch.device) -> tuple[list[float], float | None]:
    """Seconds of each step after the first, and the peak memory of the first in bytes above what was held before."""
    _give_back_free_memory()
    peak = PeakMemory(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else _resident_bytes()
    step()
    most = peak.read()
    seconds = []
    for _ in range(repeats):
        _wait(device)
        started = time.perf_counter()
        step()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return seconds, None if most is None or before is None else max(0, most - before)


def measure(subject: Subject, sizes: Sequence[int], options: argparse.Namespace, device: torch.device) -> list[Result]:
    """Rows of one head, from the smallest bags to the largest that fit the limits."""
    rows: list[Result] = []
    last_size, last_seconds = 0, 0.0
    for size in sizes:
        bags = BAGS.get(size, 1)
        name = f"{bags} x {size}"
        if subject.quadratic and device.type == "cpu" and size > QUADRATIC_LIMIT:
            print(f"{subject.name}, {name}: left out, full attention is bounded at {QUADRATIC_LIMIT} on a CPU")
            break
        growth = (size / last_size) ** (2 if subject.quadratic else 1) if last_size else 0.0
        if last_seconds * bags * growth > options.limit_s:
            expected = last_seconds * bags * growth
            print(f"{subject.name}, {name}: left out, about {expected:.0f} s are more than the limit")
            rows.append(Result.of(subject.name, f"{name}: left out, expected", "s", [expected]))
            break
        seconds, memory = time_step(subject.make_step(size, bags), options.repeats, device)
        last_size, last_seconds = size, min(seconds) / bags
        rows.append(Result.of(subject.name, f"{name}: forward and backward", "ms", [1e3 * s for s in seconds]))
        if memory is not None:
            rows.append(Result.of(subject.name, f"{name}: peak memory", "MB", [memory / 1e6]))
    return rows


def _give_back_free_memory() -> None:
    """What earlier steps freed, so that it does not hide what the next one takes; of glibc alone."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return


def _resident_bytes() -> int | None:
    """What the process holds now; None where the system cannot tell."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Time every head and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="+", help="only these subjects; all registered heads and torchmil's otherwise")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="instances per bag, ascending")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit-s", type=float, default=10.0, help="no step may be expected to take longer")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    device = resolve_device(options.device)
    if not torchmil_peer.is_installed():
        print(torchmil_peer.MISSING)
    rows = []
    for subject in subjects(options.dim, device):
        if options.heads is None or subject.name in options.heads:
            rows += measure(subject, options.sizes, options, device)
    print_results(rows)
    write_results(options.out or Path(f"benchmarks/results/aggregators_{device.type}.csv"), rows)
    return rows


if __name__ == "__main__":
    main()
