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

from extract.errors import BackboneError, StoreError
from extract.signals import STOPPING
from extract.store.core.remote_path import RemotePath, StorePath

LEFT_TO_OTHERS = 3
"""Exit code of a run that failed nowhere, but left slides to another process that is at work on them."""

_OF_THE_PARENT = ("--device", "--redo")


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


def check_claims(store: StorePath) -> None:
    """Refuse to share slides among processes where none sees what another is at work on.

    Raises:
        StoreError: the store lies at a URL.
    """
    if isinstance(store, RemotePath):
        raise StoreError(
            f"got several devices for {store} → at a URL no process sees what another is at work on, and each would "
            f"embed every slide → extract into a folder and copy it with mil store convert FOLDER {store} --format "
            f"zarr, or give each device slides of its own with --device"
        )


def run_fleet(devices: Sequence[str], program: Sequence[str], arguments: Sequence[str]) -> int:
    """Run the same command once per device, and show what each prints, line by line with its device.

    Ctrl-C, SIGTERM and SIGHUP reach every process, which then finishes its batches and saves.

    Args:
        devices: one per process.
        program: what starts the command line in a process of its own, such as ``python -m mil``.
        arguments: its arguments, with a ``--device`` that is replaced.

    Returns:
        The largest exit code. `LEFT_TO_OTHERS` counts only where all end with it: what one process leaves to another of
        the fleet, that one accounts for.
    """
    processes = _start_all([[*program, *with_device(arguments, device)] for device in devices])

    def hand_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in STOPPING}
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
    return max((abs(code) for code in codes if code != LEFT_TO_OTHERS), default=LEFT_TO_OTHERS)


def _start_all(commands: Sequence[Sequence[str]]) -> list["subprocess.Popen[str]"]:
    """One process per command, or none."""
    processes: list[subprocess.Popen[str]] = []
    try:
        for command in commands:
            processes.append(_start(command))
    except BaseException:
        for process in processes:
            process.terminate()
        for process in processes:
            process.communicate()
        raise
    return processes


def _start(command: Sequence[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        # a signal from the terminal is handed on by the run, once
        start_new_session=True,
    )


def with_device(arguments: Sequence[str], device: str) -> list[str]:
    """The arguments with another ``--device``; what stands behind ``--`` are slides, whatever it looks like.

    ``--redo`` is left out: it is done once, before the processes start.
    """
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    kept, skip = [], False
    for argument in arguments[:end]:
        if skip or argument in _OF_THE_PARENT:
            skip = argument in _OF_THE_PARENT and not skip
            continue
        if not argument.startswith(tuple(f"{flag}=" for flag in _OF_THE_PARENT)):
            kept.append(argument)
    return [*kept, "--device", device, *arguments[end:]]


def _show(device: str, process: "subprocess.Popen[str]") -> None:
    for line in process.stdout or ():
        sys.stdout.write(f"[{device}] {line}")
        sys.stdout.flush()
