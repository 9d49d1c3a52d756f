"""How much memory something took at its most."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mil.errors import ConfigError

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Peak memory from here on: on a GPU what torch has allocated there, on a CPU this whole process, bags included.

    Example:
        >>> peak = PeakMemory(torch.device("cpu"))
        >>> peak.read() is None or peak.read() > 0
        True
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._measured = device, True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            # Linux alone forgets an earlier peak on request
            _RESET.write_text("5")
        except OSError:
            self._measured = False

    def read(self) -> int | None:
        """Bytes; None where the system cannot tell."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        if not self._measured:
            return None
        lines = _STATUS.read_text().splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


ELEMENTS_PER_THREAD = 1 << 18


def resolve_device(name: str) -> torch.device:
    """``auto`` is CUDA when there is one, else the CPU.

    Raises:
        ConfigError: torch does not have this device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = ["cpu", *(["cuda"] if count else []), *(f"cuda:{index}" for index in range(count))]
    if name not in known:
        raise ConfigError(
            f"got device={name} → torch can use {', '.join(known)} here → use device=auto, or check the driver"
        )
    return torch.device(name)


@contextmanager
def cpu_threads(elements: float) -> Iterator[None]:
    """Let torch use no more CPU threads than a step has work for, and give it back its own number afterwards.

    Steps of a few hundred instances gain next to nothing from a second thread, and lose up to eight times when another
    process wants its core (measured: 0.10 against 0.80 s an epoch), because threads wait for each other by spinning.

    Args:
        elements: numbers in the instances of a step.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, round(elements / ELEMENTS_PER_THREAD))))
    try:
        yield
    finally:
        torch.set_num_threads(before)
