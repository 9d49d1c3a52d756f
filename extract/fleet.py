"""Several GPUs of one machine: one process each, all pulling slides from the same queue.

The queue is the store: a slide that one process is at work on is claimed by its draft, and the others go on with the
next. So the processes need no master, one may die without harm, and the same works over machines that share a disk.
"""

import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import FrameType

from extract.errors import BackboneError


def devices_of(text: str) -> list[str]:
    """The devices that ``--device`` names: ``all`` is every GPU, a comma separates several.

    Raises:
        BackboneError: a device is named twice, or there is no GPU at all.
    """
    if text != "all":
        devices = [part.strip() for part in text.split(",")]
        if len(set(devices)) < len(devices) or not all(devices):
            raise BackboneError(f"got device {text!r} → expected each device once, such as cuda:0,cuda:1 → correct it")
        return devices
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        raise BackboneError("got --device all → torch sees no CUDA device → use --device cpu, or run mil doctor")
    return [f"cuda:{i}" for i in range(count)]


def run_fleet(devices: Sequence[str], arguments: Sequence[str]) -> int:
    """Run the same command once per device, and show what each prints, line by line with its device.

    Ctrl-C and SIGTERM reach every process, which then finishes its batches and saves.

    Args:
        devices: one per process.
        arguments: of the command ``mil``, with a ``--device`` that is replaced.

    Returns:
        The largest exit code.
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", "from mil.cli import main; main()", *with_device(arguments, device)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # a signal from the terminal is handed on below, once
            start_new_session=True,
        )
        for device in devices
    ]

    def hand_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        threads = [
            threading.Thread(target=_show, args=(device, process))
            for device, process in zip(devices, processes, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        codes = [process.wait() for process in processes]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return max(abs(code) for code in codes)


def with_device(arguments: Sequence[str], device: str) -> list[str]:
    """The arguments with another ``--device``."""
    kept, skip = [], False
    for argument in arguments:
        if skip or argument == "--device":
            skip = argument == "--device" and not skip
            continue
        if not argument.startswith("--device="):
            kept.append(argument)
    return [*kept, "--device", device]


def _show(device: str, process: "subprocess.Popen[str]") -> None:
    for line in process.stdout or ():
        sys.stdout.write(f"[{device}] {line}")
        sys.stdout.flush()
