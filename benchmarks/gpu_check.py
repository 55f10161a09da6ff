"""The Triton kernels on one GPU: their tests, then their times against the copy bandwidth and PEER-pytorch.

    python benchmarks/gpu_check.py --out benchmarks/results/NAME.json      # under 9 minutes
    python benchmarks/gpu_check.py --quick                                  # the tests and one shape
    python benchmarks/gpu_check.py --quick --device cpu                     # a smoke run in Triton's interpreter

A time is the median over repetitions in which all measured functions take turns, each after a pass over a buffer
that leaves nothing of its inputs in the cache. Functions are timed by events on the device, launched one by one as in
training; `replayed` steps have their forward and backward passes in a CUDA graph, as with train.cuda_graph. Bytes are
counted, not measured: `bytes` counts every looked-up row as often as it is looked up, `fewest_bytes` each distinct row
once. Measured shapes come in order of weight; those for which no time is left are listed as such. The smoke run shows
that the script works: its figures are not measurements.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

STARTED = time.monotonic()
ROOT = Path(__file__).parents[1]
TESTS = ("tests/kernels/test_triton_gpu.py", "tests/train/test_captured.py")
FLUSH_BYTES = 2**29
"""Ten times the largest GPU's cache."""

Step = Callable[[], Any]


class Training(NamedTuple):
    """A layer in training."""

    passes: Step
    """Forward and backward."""
    optimizer: Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the figures go, as JSON")
    parser.add_argument("--quick", action="store_true", help="one shape, few repetitions")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a smoke run, no measurement")
    parser.add_argument("--minutes", type=float, default=8.5, help="begin no measurement after so long")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu_check needs a CUDA device; `--device cpu --quick` runs its code in Triton's interpreter.")
    if options.device == "cpu" and not options.quick:
        sys.exit("gpu_check on the CPU is a smoke run only: add --quick.")
    report: dict[str, Any] = {}
    try:
        check(options, report)
    finally:  # what was measured before a failure is kept
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(0 if report["tests"]["passed"] else 1)


def check(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Fill in the report."""
    import torch
    import triton

    from myriad import kernels

    interpreted = options.device == "cpu"
    kernels.select("triton")
    bench = Bench(torch.device(options.device), options.quick, STARTED + 60 * options.minutes)
    report |= {
        "device": "none: interpreted on the CPU" if interpreted else torch.cuda.get_device_name(),
        "interpreted": interpreted,
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "triton": triton.__version__},
        "cuda": torch.version.cuda,
        "tests": run_tests(),
        "copy_gigabytes_per_second": bench.copy_bandwidth(),
        "measurements": [],
        "skipped": [],
    }
    if interpreted:
        print("A smoke run: none of these figures is a measurement.")
    print(f"{report['device']}: copies {report['copy_gigabytes_per_second']:,.0f} GB/s")
    for measure in (bench.whole_model, bench.decode):
        report[measure.__name__] = bench.or_out_of_memory(measure)
        print(measure.__name__, json.dumps(report[measure.__name__]))
    for shape in () if interpreted else LAYERS:
        report.setdefault("kernels", []).append(bench.kernels_of(shape))
    for shape in tiny() if interpreted else shapes(options.quick):
        rows = bench.no_time_left(shape) or bench.measure(shape, report["copy_gigabytes_per_second"])
        report["measurements" if isinstance(rows, list) else "skipped"] += rows if isinstance(rows, list) else [rows]
    report["seconds"] = round(time.monotonic() - STARTED, 1)


def run_tests() -> dict[str, Any]:
    """The GPU's tests in processes of their own: most of their time goes into compiling kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", *TESTS]
    command += ["-n", str(min(12, os.cpu_count() or 1))] if find_spec("xdist") else []
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout[-4000:])
    return {"passed": done.returncode == 0, "summary": (done.stdout.splitlines() or [""])[-1]}


class Shape(NamedTuple):
    tokens: int
    width: int
    side: int
    dtype: str
    heads: int = 8
    per_head: int = 16
    d_key: int = 128

    @property
    def experts(self) -> int:
        return self.side**2

    @property
    def active(self) -> int:
        return self.heads * self.per_head


LAYERS = [Shape(16384, 256, side, "bfloat16") for side in (1024, 256)]
"""Whose kernels are listed."""


def shapes(quick: bool) -> Iterator[Shape]:
    """The shapes of the comparison, the most telling ones first."""
    if quick:
        yield Shape(16384, 256, 256, "float32")
        return
    for tokens, width in ((16384, 256), (1024, 256), (16384, 1024), (1024, 1024)):
        for side in (1024, 256, 512):
            for dtype in ("float32", "bfloat16"):
                yield Shape(tokens, width, side, dtype)


def tiny() -> Iterator[Shape]:
    for dtype in ("float32", "bfloat16"):
        yield Shape(3, 16, 4, dtype, heads=2, per_head=2, d_key=4)


class Bench:
    """Functions timed side by side on one device."""

    def __init__(self, device: Any, quick: bool, deadline: float) -> None:
        import torch

        self.device, self.quick, self.deadline = device, quick, deadline
        self.on_gpu = device.type == "cuda"
        self.flushed = torch.empty(FLUSH_BYTES if self.on_gpu else 16, dtype=torch.int8, device=device)

    def no_time_left(self, shape: Shape) -> dict[str, Any] | None:
        if time.monotonic() < self.deadline:
            return None
        return {"what": shape._asdict(), "note": "no time was left"}

    def or_out_of_memory(self, function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        import torch

        try:
            return function()
        except torch.OutOfMemoryError:
            return {"note": "out of memory"}

    def once(self, function: Step) -> float:
        """Milliseconds of one call with nothing in the cache."""
        import torch

        self.flushed.zero_()
        if not self.on_gpu:
            started = time.perf_counter()
            function()
            return 1e3 * (time.perf_counter() - started)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    def times(self, functions: dict[str, Step], seconds: float = 1.5) -> dict[str, dict[str, float]]:
        """Median, fastest and slowest milliseconds of functions that take turns, after two calls of each."""
        if not self.on_gpu:
            rounds = 1
        else:
            warm = [min(self.once(function) for _ in range(2)) for function in functions.values()]
            rounds = min(5 if self.quick else 20, max(5, int(1e3 * seconds / sum(warm))))
        taken: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(rounds):
            for name, function in functions.items():
                taken[name].append(self.once(function))
        return {
            name: {"median": statistics.median(ms), "fastest": min(ms), "slowest": max(ms), "repetitions": len(ms)}
            for name, ms in taken.items()
        }

    def copy_bandwidth(self) -> float:
        """Gigabytes a second of a large copy on the device, read and written bytes together."""
        import torch

        source = torch.randint(127, (2**30 if self.on_gpu else 2**16,), dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        (ms,) = self.times({"copy": lambda: target.copy_(source)}).values()
        return 2 * source.numel() / ms["median"] / 1e6

    def measure(self, shape: Shape, copy_gigabytes_per_second: float) -> list[dict[str, Any]] | dict[str, Any]:
        """Every op of a layer of one shape, the layer's training step, and PEER-pytorch's."""
        import torch

        try:
            functions, counts = ops(shape, self.device)
            times = self.times(functions)
            del functions  # the layers need the memory
            steps, note = self.layer_steps(shape)
        except torch.OutOfMemoryError:
            return {"what": shape._asdict(), "note": "out of memory"}
        rows = []
        for name, ms in {**times, **steps}.items():
            row: dict[str, Any] = {"op": name, **shape._asdict(), "ms": ms}
            if name in counts:
                gathered, fewest = counts[name]
                speed = gathered / ms["median"] / 1e6
                row |= {"bytes": gathered, "fewest_bytes": fewest, "gigabytes_per_second": round(speed, 1)}
                row["share_of_copy"] = round(speed / copy_gigabytes_per_second, 3)
                row["share_of_copy_fewest"] = round(fewest / ms["median"] / 1e6 / copy_gigabytes_per_second, 3)
            if name.startswith("layer step"):
                theirs = steps.get(name.replace("layer", "PEER-pytorch", 1))
                row |= {"PEER-pytorch": note} if note else {}
                row |= {"times_as_fast_as_peer_pytorch": round(theirs["median"] / ms["median"], 2)} if theirs else {}
            rows.append(row)
        print_rows(shape, rows)
        return rows

    def layer_steps(self, shape: Shape) -> tuple[dict[str, dict[str, float]], str | None]:
        """Training steps of our layer and, side by side, PEER-pytorch's, or why not."""
        import torch

        ours = layer_training(shape, self.device)
        steps, note = self.both_ways("layer step", ours), None
        try:
            theirs = peer_pytorch_training(shape, self.device)
            return self.times(steps | self.both_ways("PEER-pytorch step", theirs)), None
        except (ImportError, torch.OutOfMemoryError) as error:
            note = "not installed" if isinstance(error, ImportError) else "out of memory"
        if self.on_gpu:
            torch.cuda.empty_cache()
        return self.times(steps), note

    def both_ways(self, name: str, training: Training) -> dict[str, Step]:
        """A step launched kernel by kernel and, if it can be captured, with its passes replayed."""
        steps: dict[str, Step] = {name: launched(training)}
        if self.on_gpu:
            try:
                steps[f"{name}, replayed"] = replayed(training)
            except RuntimeError as error:
                print(f"{name} cannot be captured: {error}")
        return steps

    def kernels_of(self, shape: Shape) -> dict[str, Any]:
        """The time that each kernel of a layer's training step takes, in microseconds, by PyTorch's profiler."""
        import torch
        from torch.profiler import ProfilerActivity, profile

        step, rounds = launched(layer_training(shape, self.device)), 5
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            for _ in range(rounds):
                step()
            torch.cuda.synchronize()
        kernels = [(event.key, event.count, event.device_time_total) for event in found.key_averages()]
        kernels = sorted((kernel for kernel in kernels if kernel[2]), key=lambda kernel: -kernel[2])
        return {
            "what": shape._asdict(),
            "microseconds": round(sum(time for *_, time in kernels) / rounds, 1),
            "launches": sum(count for _, count, _ in kernels) / rounds,
            "longest": {name: [count / rounds, round(time / rounds, 1)] for name, count, time in kernels[:24]},
        }

    def decode(self) -> dict[str, Any]:
        """One token through a layer: launched kernel by kernel, and replayed as one CUDA graph."""
        import torch

        found: dict[str, Any] = {}
        for width in (256, 1024) if self.on_gpu else (16,):
            shape = Shape(1, width, 1024, "float32") if self.on_gpu else Shape(1, 16, 4, "float32", 2, 2, 4)
            with torch.no_grad():
                layer = new_layer(shape, self.device).eval()
                x = torch.randn(1, width, device=self.device)

                def step(layer: Any = layer, x: Any = x) -> Any:
                    return layer(x).y

                functions: dict[str, Step] = {"launched": step}
                if self.on_gpu:
                    functions["replayed"] = graph_of(step)
                found[f"width {width}, {shape.experts} experts"] = self.times(functions)
        return found

    def whole_model(self) -> dict[str, Any]:
        """Training of the preset peer-256x256 on random tokens, launched and replayed: `cuda_graph.py`'s figures."""
        from cuda_graph import whole_models

        return {"sizes": list(whole_models(self.device))}


def new_layer(shape: Shape, device: Any) -> Any:
    """A PEER layer; at bfloat16 its tables are too."""
    import torch

    from myriad.ffn import PEERConfig

    config = PEERConfig(experts=shape.experts, heads=shape.heads, experts_per_head=shape.per_head, d_key=shape.d_key)
    with device:
        layer = config.build(shape.width)
    if shape.dtype == "bfloat16":
        for name, role in layer.roles().items():
            if role == "table":
                parameter = layer.get_parameter(name)
                parameter.data = parameter.data.to(torch.bfloat16)
    return layer


def inputs(shape: Shape, device: Any) -> tuple[Any, Any]:
    """x and the gradient of y."""
    import torch

    dtype = getattr(torch, shape.dtype)
    return tuple(torch.randn(shape.tokens, shape.width, device=device).to(dtype) for _ in range(2))


def ops(shape: Shape, device: Any) -> tuple[dict[str, Step], dict[str, tuple[int, int]]]:
    """The ops of a layer by name, on experts that its own keys retrieve, and the bytes that each moves."""
    import torch

    from myriad.kernels import expert_lookup, lazy_adam, new_moments, product_key

    layer = new_layer(shape, device)
    x, grad_y = (tensor.requires_grad_() for tensor in inputs(shape, device))
    queries = torch.randn(shape.tokens, shape.heads, 2, shape.d_key, device=device, requires_grad=True)
    keys, tables = layer.keys, (layer.experts_down, layer.experts_up)
    scores, ids = product_key(queries, keys, shape.per_head)
    ids, weights = ids.flatten(1), scores.detach().softmax(-1).flatten(1).requires_grad_()
    grad_scores = torch.randn_like(scores)
    y = expert_lookup(x, ids, weights, *tables)
    with_gradient = (x, weights, *tables)
    grad = torch.autograd.grad(y, tables[0], grad_y, retain_graph=True)[0]
    table, moments = tables[0].detach().clone(), new_moments(tables[0].detach())
    adam = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "step": 5}

    def forward() -> Any:
        with torch.no_grad():
            return expert_lookup(x, ids, weights, *tables)

    def retrieve() -> Any:
        with torch.no_grad():
            return product_key(queries, keys, shape.per_head)

    functions: dict[str, Step] = {
        "expert lookup forward": forward,
        "expert lookup backward": lambda: torch.autograd.grad(y, with_gradient, grad_y, retain_graph=True),
        "product key forward": retrieve,
        "product key backward": lambda: torch.autograd.grad(scores, (queries, keys), grad_scores, retain_graph=True),
        "table update": lambda: lazy_adam(table, *moments, grad, **adam),
    }
    return functions, byte_counts(shape, len(ids.unique()), grad.layout == torch.sparse_coo)


def byte_counts(shape: Shape, distinct: int, sparse: bool) -> dict[str, tuple[int, int]]:
    """Bytes that each op moves: with every looked-up row counted, and with every distinct row counted once."""
    size = 2 if shape.dtype == "bfloat16" else 4
    row = shape.width * size
    entries, tokens = shape.tokens * shape.active, shape.tokens * row
    numbers = 4 * entries  # one float32 a token and expert
    written = distinct if sparse else shape.experts
    queries, key = 4 * shape.tokens * shape.heads * 2 * shape.d_key, 4 * shape.d_key
    scores = 4 * shape.tokens * shape.heads * 2 * shape.side
    winners = 12 * entries  # score and id
    moved = 7 * distinct * row if size == 4 else distinct * (5 * row + 8)
    return {
        "expert lookup forward": (
            2 * entries * row + 2 * tokens + 6 * numbers,
            2 * distinct * row + 2 * tokens + 6 * numbers,
        ),
        "expert lookup backward": (
            4 * entries * row + 2 * written * row + tokens + 12 * numbers,
            2 * (distinct + written) * row + 3 * tokens + 12 * numbers,
        ),
        "product key forward": (queries + 2 * scores + winners, queries + 2 * shape.side * key + winners),
        "product key backward": (
            4 * entries * key + queries + 2 * shape.side * key + winners,
            2 * queries + 4 * shape.side * key + winners,
        ),
        "table update": (moved, moved),
    }


def layer_training(shape: Shape, device: Any) -> Training:
    """Our layer with the optimizer that training has."""
    from myriad.train.optim import build_optimizer
    from myriad.train.precision import autocast

    layer = new_layer(shape, device)
    x, grad_y = inputs(shape, device)

    def passes() -> None:
        with autocast(shape.dtype, device):
            y = layer(x).y
        y.backward(grad_y.to(y.dtype))

    return Training(passes, build_optimizer(layer, lr=1e-4))


def peer_pytorch_training(shape: Shape, device: Any) -> Training:
    """The same of PEER-pytorch's layer, with PyTorch's fastest Adam, which moves every row of its tables."""
    import torch
    from PEER_pytorch import PEER

    from myriad.train.precision import autocast

    with device:
        layer = PEER(
            shape.width,
            heads=shape.heads,
            num_experts=shape.experts,
            num_experts_per_head=shape.per_head,
            dim_key=shape.d_key,
            non_competing_scores=False,  # as the paper: a softmax over each head's experts; else it keeps one of them
        )
    x, grad_y = (tensor.unsqueeze(0) for tensor in inputs(shape, device))
    if shape.dtype == "bfloat16":
        x = x.float()  # its autocast casts what it multiplies

    def passes() -> None:
        with autocast(shape.dtype, device):
            y = layer(x)
        y.backward(grad_y.to(y.dtype))

    return Training(passes, torch.optim.Adam(layer.parameters(), lr=1e-4, fused=True))


def launched(training: Training) -> Step:
    """A training step: forward, backward, optimizer."""

    def step() -> None:
        training.passes()
        training.optimizer.step()
        training.optimizer.zero_grad(set_to_none=True)

    return step


def replayed(training: Training) -> Step:
    """The same with the passes captured once, whose gradients lie where the graph writes them."""
    from myriad.kernels.table_gradient import dense_gradients

    optimizer = training.optimizer
    with dense_gradients():
        replay = graph_of(training.passes, prepare=optimizer.zero_grad)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters]
    optimizer.zero_grad(set_to_none=True)

    def step() -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        replay()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def graph_of(function: Step, prepare: Step = lambda: None) -> Step:
    """A function's kernels captured once and replayed together.

    Args:
        prepare: called between the rehearsals and the capture.
    """
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    prepare()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def print_rows(shape: Shape, rows: list[dict[str, Any]]) -> None:
    print(f"\n{shape.tokens} tokens, width {shape.width}, {shape.side}x{shape.side} experts, {shape.dtype}")
    for row in rows:
        ms, share = row["ms"], row.get("share_of_copy")
        spread = f"({ms['fastest']:.3f} to {ms['slowest']:.3f})"
        more = "" if share is None else f"{row['gigabytes_per_second']:8,.0f} GB/s, {share:.0%} of copy"
        more += f"  {row['times_as_fast_as_peer_pytorch']} x" if "times_as_fast_as_peer_pytorch" in row else ""
        more += f"  PEER-pytorch: {row['PEER-pytorch']}" if "PEER-pytorch" in row else ""
        print(f"  {row['op']:28s}{ms['median']:10.3f} ms {spread:24s}{more}", flush=True)


if __name__ == "__main__":
    main()
