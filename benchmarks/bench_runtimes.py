"""What each CPU runtime does with a backbone: tiles per second on all cores, and how close it stays to torch.

    pip install onnxruntime onnxscript          # to have it in the comparison
    python -m benchmarks.bench_runtimes

As many threads as there are cores embed batches at once, each forward on one core, which is how the pipeline works.
The runtimes take turns, repeat by repeat, so that a slow moment of the machine hits all of them; the CPU time a tile
also holds where others were at work on it. Only the forward is timed: images in, embeddings out. The architectures
have random weights, on which the time does not depend; tf_efficientnet_lite0 is the default backbone's.
"""

import argparse
import importlib.util
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.machine import Result, print_results, write_results
from extract.backbones.runtimes import Forward, available_runtimes, check_parity, compile_model
from extract.memory import keep_freed_memory
from extract.pipeline.jobs import available_cores

INPUT_PX = 224
MODELS = ("tf_efficientnet_lite0", "resnet18", "vit_small_patch16_224")


def load_model(name: str) -> nn.Module:
    """A timm model with random weights, laid out as the pipeline lays it out."""
    import timm

    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0)
    return model.eval().to(memory_format=torch.channels_last)


def random_images(batch_size: int) -> Tensor:
    """Images as a backbone prepares them: float32 [batch_size, 3, 224, 224], channels last."""
    images = torch.randn(batch_size, 3, INPUT_PX, INPUT_PX, generator=torch.Generator().manual_seed(0))
    return images.to(memory_format=torch.channels_last)


def compile_onnxruntime(model: nn.Module, example: Tensor) -> Forward:
    """ONNX Runtime on one core a call; not a runtime of the product, since it was nowhere clearly the fastest."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter speaks of its own future
        # a file, since weights of more than 2 GB do not fit one message
        file = Path(folder, "model.onnx")
        torch.onnx.export(model, (example,), file, dynamo=True, verbose=False, input_names=["images"])
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def forward(images: Tensor) -> Tensor:
        (features,) = session.run(None, {"images": images.contiguous().numpy()})
        return torch.from_numpy(features)

    return forward


def compile_for(runtime: str, model: nn.Module, example: Tensor) -> Forward:
    """A runtime of the product, or ONNX Runtime beside them."""
    if runtime == "onnxruntime":
        return compile_onnxruntime(model, example)
    return compile_model(model, example, runtime, available_cores())


def time_forward(forward: Forward, images: Tensor, seconds: float) -> tuple[float, float]:
    """Tiles per second of all cores together, each one busy with batches of its own, and CPU seconds a tile."""
    cores = available_cores()
    with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as workers:

        def run(n_batches: int) -> float:
            started = time.monotonic()
            list(workers.map(lambda _: forward(images), range(n_batches)))
            return time.monotonic() - started

        n_batches = cores * max(1, round(seconds / run(cores)))
        cpu = time.process_time()
        rate = n_batches * len(images) / run(n_batches)
        return rate, (time.process_time() - cpu) / (n_batches * len(images))


def measure(name: str, batch_sizes: Sequence[int], repeats: int, seconds: float) -> list[Result]:
    """Rates of every installed runtime at every batch size, and their smallest cosine with torch."""
    model = load_model(name)
    runtimes = available_runtimes()
    if all(importlib.util.find_spec(module) for module in ("onnxruntime", "onnx", "onnxscript")):
        runtimes.append("onnxruntime")
    forwards = {
        (runtime, n): compile_for(runtime, model, random_images(n)) for runtime in runtimes for n in batch_sizes
    }
    times: dict[tuple[str, int], list[tuple[float, float]]] = {key: [] for key in forwards}
    for _ in range(repeats):
        for (runtime, n), forward in forwards.items():
            times[runtime, n].append(time_forward(forward, random_images(n), seconds))
    results = []
    for (runtime, n), values in times.items():
        rates, cpu = zip(*values, strict=True)
        results.append(Result.of(name, f"{runtime}, batch {n}", "tiles/s", rates))
        results.append(Result.of(name, f"{runtime}, batch {n}, CPU time", "s/tile", cpu))
    for runtime in runtimes:
        cosines = [check_parity(forwards["torch", n], forwards[runtime, n], random_images(n)) for n in batch_sizes]
        results.append(Result.of(name, f"{runtime}, smallest cosine with torch", "cosine", cosines))
    return results


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Measure every model and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="timm names")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each repeat")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/runtimes.csv"))
    options = parser.parse_args(arguments)
    # the pipeline does so too; torch would be slower without
    keep_freed_memory()
    results: list[Result] = []
    for name in options.models:
        results += measure(name, options.batch_sizes, options.repeats, options.seconds)
    print_results(results)
    write_results(options.out, results)
    return results


if __name__ == "__main__":
    main()
