"""What a result row says of the machine and the code, and how rows are written."""

import csv
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from extract.pipeline.jobs import available_cores


@dataclass(frozen=True)
class Result:
    """One measured quantity: median and spread over ``n`` repeats."""

    subject: str
    metric: str
    unit: str
    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, subject: str, metric: str, unit: str, values: Sequence[float]) -> "Result":
        """Summarise repeats."""
        return cls(subject, metric, unit, statistics.median(values), min(values), max(values), len(values))


def facts() -> dict[str, str]:
    """Commit, processor, cores, device and versions."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": commit or "unknown",
        "processor": _processor(),
        "cores": str(available_cores()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def write_results(path: Path, results: Sequence[Result]) -> None:
    """Write results as CSV, each row with the facts."""
    machine = facts()
    rows = [{k: f"{v:.5g}" if isinstance(v, float) else v for k, v in asdict(r).items()} | machine for r in results]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def print_results(results: Sequence[Result]) -> None:
    """Print results as aligned lines."""
    for r in results:
        print(f"{r.subject:16} {r.metric:44} {r.median:10.4g} {r.unit:10} [{r.low:.4g}, {r.high:.4g}]  n={r.n}")
