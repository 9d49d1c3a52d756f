"""The GPU, its driver, and whether torch can use them: told loudly where it cannot, since a CPU takes days instead."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

MINIMUM_DRIVER = {11: 450, 12: 525, 13: 580}
"""Major version of CUDA → oldest branch of the Linux driver on which programs built with it run.

From "CUDA Toolkit and Minimum Required Driver Version for CUDA Minor Version Compatibility", a table of NVIDIA's CUDA
release notes and of https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html.
"""

WHEELS = {12: "cu126", 13: "cu130"}
"""Major version of CUDA → the index of torch builds that has it in a version that this library takes."""

_VERSION = re.compile(r"\s(\d{3,4}\.\d+(?:\.\d+)?)\s")
_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class GpuFacts:
    """What this machine and this installation of torch say.

    Attributes:
        devices: device files of GPUs that this process can see.
        driver: version of the NVIDIA driver, or None.
        torch_version: of torch.
        torch_cuda: version of CUDA that torch was built with, or None for a build without CUDA.
        usable: whether torch can compute on a GPU.
        visible: ``CUDA_VISIBLE_DEVICES``, or None where it is not set.
        unsupported: GPUs whose architecture is not in this build of torch.
    """

    devices: tuple[str, ...]
    driver: str | None
    torch_version: str
    torch_cuda: str | None
    usable: bool
    visible: str | None = None
    unsupported: tuple[str, ...] = ()


def check_device(device: str = "auto", gather: Callable[[], GpuFacts] | None = None) -> list[str]:
    """Loud warnings where there is a GPU that torch cannot use; a few milliseconds where there is none.

    Args:
        device: what was asked for; whoever asks for the CPU is told nothing.
        gather: how the facts are found.

    Returns:
        One sentence per problem, each with the command that solves it.
    """
    return [] if device == "cpu" else gpu_warnings((gather or gather_facts)())


def gpu_warnings(facts: GpuFacts) -> list[str]:
    """What is wrong with the GPU, as sentences; empty where nothing is, or where there is no GPU."""
    if facts.usable:
        return [_unsupported(facts)] if facts.unsupported else []
    if not facts.devices and facts.driver is None:
        return []
    if not facts.devices:
        return [
            f"got an NVIDIA driver ({facts.driver}) but no GPU in this process → expected a device file such as "
            f"/dev/nvidia0 → give the container its GPUs (--gpus all), or ask the cluster for one; until then all is "
            f"computed on the CPU"
        ]
    if is_hidden(facts):
        return [
            f"got {_gpus(facts)} hidden by CUDA_VISIBLE_DEVICES={facts.visible!r} → expected its number → unset "
            f"CUDA_VISIBLE_DEVICES; until then all is computed on the CPU"
        ]
    return [_unusable(facts)]


def is_hidden(facts: GpuFacts) -> bool:
    """Whether the environment hides every GPU from this process."""
    return facts.visible is not None and facts.visible.strip() in ("", "-1", "NoDevFiles")


def _unusable(facts: GpuFacts) -> str:
    """Why torch computes on the CPU beside a GPU, and the way out."""
    got = f"got {_gpus(facts)} that torch {facts.torch_version} cannot use, so that all is computed on the CPU"
    driver = _branch(facts.driver)
    if facts.torch_cuda is None:
        return f"{got} → this torch was built without CUDA → {install_line(driver)}"
    needed = MINIMUM_DRIVER.get(int(facts.torch_cuda.split(".")[0]))
    if driver is None:
        return (
            f"{got} → no NVIDIA driver answers → install or load the driver"
            f"{f' {needed} or newer' if needed else ''} (nvidia-smi must list the GPU), then run mil doctor"
        )
    if needed is not None and driver < needed:
        other = install_line(driver)
        return (
            f"{got} → the driver {facts.driver} is older than this torch needs (CUDA {facts.torch_cuda}: {needed} or "
            f"newer) → update the driver to {needed} or newer{f', or {other}' if other else ''}"
        )
    return (
        f"{got} → the driver {facts.driver} is new enough for CUDA {facts.torch_cuda} → look at the output of "
        f"nvidia-smi (after an update of the driver, reboot), and run python -c 'import torch; torch.cuda.init()' to "
        f"see the reason"
    )


def install_line(driver: int | None) -> str:
    """The command that installs the newest torch that runs on a branch of the driver; empty where there is none.

    Args:
        driver: branch of the driver, such as 535; None takes any.
    """
    fitting = [cuda for cuda in WHEELS if driver is None or MINIMUM_DRIVER[cuda] <= driver]
    if not fitting:
        return ""
    index = f"https://download.pytorch.org/whl/{WHEELS[max(fitting)]}"
    return f'pip uninstall -y torch torchvision && pip install "torch>=2.10" torchvision --index-url {index}'


def _unsupported(facts: GpuFacts) -> str:
    return (
        f"got {', '.join(facts.unsupported)}, for which torch {facts.torch_version} (CUDA {facts.torch_cuda}) has no "
        f"kernels → expected one of the architectures that it was built for → install a torch built for this GPU with "
        f"one of the index URLs {', '.join(f'https://download.pytorch.org/whl/{name}' for name in WHEELS.values())}, "
        f"or use --device cpu"
    )


def _gpus(facts: GpuFacts) -> str:
    return "a GPU" if len(facts.devices) == 1 else f"{len(facts.devices)} GPUs"


def _branch(driver: str | None) -> int | None:
    """The branch 535 of the driver 535.183.01."""
    return int(driver.split(".")[0]) if driver else None


def gather_facts() -> GpuFacts:
    """Ask the machine and torch; torch is not asked where there is nothing that it could use."""
    devices = find_devices()
    driver = find_driver() if devices or _DRIVER_FILE.exists() else None
    usable = bool(devices) and torch.cuda.is_available()
    return GpuFacts(
        devices,
        driver,
        torch.__version__,
        torch.version.cuda,
        usable,
        os.environ.get("CUDA_VISIBLE_DEVICES"),
        _find_unsupported() if usable else (),
    )


def find_devices(root: Path = Path("/dev")) -> tuple[str, ...]:
    """Device files of GPUs: ``nvidia0``, ..., or ``dxg`` under Windows' Linux."""
    found = [path for path in root.glob("nvidia*") if path.name.removeprefix("nvidia").isdecimal()]
    return tuple(sorted(str(path) for path in (*found, *root.glob("dxg"))))


def find_driver(file: Path = _DRIVER_FILE) -> str | None:
    """Version of the NVIDIA driver: of the loaded kernel module, else what ``nvidia-smi`` says; None without one."""
    try:
        match = _VERSION.search(file.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        match = None
    if match:
        return match[1]
    tool = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path="/usr/lib/wsl/lib")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = _VERSION.search(f" {said} ")
    return match[1] if match else None


def _find_unsupported() -> tuple[str, ...]:
    """GPUs that this build of torch has no kernels for, each kind once."""
    built = torch.cuda.get_arch_list()
    found = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if not runs_on(built, (major, minor)):
            found.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    return tuple(dict.fromkeys(found))


def runs_on(built: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether kernels of these architectures run on a GPU.

    Machine code (``sm_80``) runs on the same major version from its minor version on, portable code (``compute_90``)
    on every newer one. Names with a letter (``sm_90a``) are for exactly that GPU.

    Args:
        built: as ``torch.cuda.get_arch_list`` gives them; an empty list says nothing, and counts as yes.
        capability: major and minor version of the GPU.
    """
    for name in built:
        kind, _, digits = name.partition("_")
        number = digits.rstrip("af")
        architecture = (int(number[:-1] or 0), int(number[-1:] or 0))
        if architecture == capability:
            return True
        # a letter binds code to one GPU
        if number != digits or architecture > capability:
            continue
        if kind == "compute" or architecture[0] == capability[0]:
            return True
    return not built


def describe_gpus() -> list[Mapping[str, object]]:
    """Name, memory in bytes, compute capability and native bf16 of every GPU that torch can use."""
    found: list[Mapping[str, object]] = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": facts.name,
                "memory_bytes": facts.total_memory,
                "capability": f"{facts.major}.{facts.minor}",
                # from Ampere on; torch emulates it below, at a fraction of the speed
                "bf16": facts.major >= 8,
            }
        )
    return found
