"""What of a machine an extraction needs: cores, memory, disk, open files, file systems."""

import mmap
import os
import platform
import shutil
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from extract.errors import StoreError
from extract.pipeline.jobs import available_cores
from extract.store.core.files import sync
from extract.store.core.remote_path import RemotePath

Status = Literal["ok", "warning", "error"]
NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "9p", "fuse.sshfs", "fuse.s3fs", "fuse.gcsfuse", "fuse.rclone")
_DISK_BYTES = 64 << 20
_SLOW_DISK_MB_S = 50.0
_LOW_DISK_BYTES = 10e9
_LOW_MEMORY_BYTES = 4e9
_LOW_OPEN_FILES = 1024


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
