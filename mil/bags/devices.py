"""How much memory something took at its most."""

from pathlib import Path

import torch

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
