"""Training of peer-256x256 on random tokens, launched kernel by kernel and replayed as CUDA graphs: tokens a second.

python benchmarks/cuda_graph.py --out benchmarks/results/NAME.json    # on a GPU, under a minute
python benchmarks/cuda_graph.py --device cpu                          # a smoke run of the launched form
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from myriad import presets
from myriad.ffn import PEERConfig
from myriad.models import TransformerConfig
from myriad.train.captured import Captured, CudaGraphs
from myriad.train.optim import build_optimizer, clip_gradients
from myriad.train.passes import ForwardBackward, Launched
from myriad.train.precision import autocast
from myriad.train.replica import Replica

VOCABULARY = 50257
SIZES = (1024, 4096, 16384, 32768)


def config_of(gpu: bool) -> TransformerConfig:
    if gpu:
        return presets.get("peer-256x256").model.model_copy(update={"vocab_size": VOCABULARY})
    peer = PEERConfig(experts=16, heads=2, experts_per_head=2, d_key=4)
    return TransformerConfig(
        vocab_size=32, context=4, layers=1, d_model=16, heads=2, ffns={"peer": peer}, pattern=["peer"]
    )


def step_of(model: Any, optimizer: Any, passes: ForwardBackward, ids: Any, targets: Any) -> Any:
    """A step as the loop has it: passes, clipping, the look at the loss, update, statistics."""

    def step() -> float:
        output = passes(ids, targets)
        norm = clip_gradients(model.parameters(), 1.0)
        if bool((output.loss + output.aux_loss + norm).isfinite()):
            optimizer.step()
            model.after_step(list(output.loads))
        optimizer.zero_grad(set_to_none=True)
        return output.loss.item()

    return step


def milliseconds(step: Any, rounds: int, warmup: int, device: torch.device) -> tuple[list[float], float]:
    loss = float("nan")
    for _ in range(warmup):
        loss = step()
    times = []
    for _ in range(rounds):
        synchronize(device)
        started = time.perf_counter()
        loss = step()
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - started))
    return times, loss


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(model: Any, tokens: int, device: torch.device, rounds: int, warmup: int) -> dict[str, Any]:
    context = model.config.context
    ids = torch.randint(model.config.vocab_size, (tokens // context, context + 1))
    ids, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    optimizer = build_optimizer(model, lr=1e-4)
    precision = "bfloat16" if device.type == "cuda" else "float32"
    launched = Launched(Replica(model), partial(autocast, precision, device), device, targets=tokens, passes=1)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    found: dict[str, Any] = {"tokens_per_step": tokens, "parameters": parameters}
    for name in ("launched", "captured") if device.type == "cuda" else ("launched",):
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        passes: ForwardBackward = launched
        if name == "captured":
            on_device = ids.to(device), targets.to(device)
            passes = Captured(launched, *on_device, model.parameters(), CudaGraphs(device), accumulates=False)
        made = time.perf_counter() - started
        step = step_of(model, optimizer, passes, ids, targets)
        times, loss = milliseconds(step, rounds, warmup, device)
        optimizer.zero_grad(set_to_none=True)
        found[name] = {
            "ms": {
                "median": round(statistics.median(times), 3),
                "fastest": round(min(times), 3),
                "slowest": round(max(times), 3),
            },
            "tokens_per_second": round(1e3 * tokens / statistics.median(times), 1),
            "seconds_to_capture": round(made, 3),
            "loss": loss,
            "peak_allocated_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
            "peak_reserved_bytes": torch.cuda.max_memory_reserved() if device.type == "cuda" else None,
        }
        del passes, step
    return found


def whole_models(device: torch.device) -> Iterator[dict[str, Any]]:
    """The figures of every size, each as soon as it is measured."""
    gpu = device.type == "cuda"
    with device:
        model = config_of(gpu).build().train()
    for tokens in SIZES if gpu else (16, 32):
        rounds = 20 if tokens <= 4096 else 10
        yield measure(model, tokens, device, rounds if gpu else 2, 4 if gpu else 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the figures go, as JSON")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    started = time.perf_counter()
    torch.manual_seed(0)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu: a smoke run, no measurement",
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda},
        "sizes": [],
    }
    try:
        for found in whole_models(device):
            report["sizes"].append(found)
            print(json.dumps(found), flush=True)
    finally:  # what was measured before a failure is kept
        report["seconds"] = round(time.perf_counter() - started, 1)
        if options.out is not None:
            options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
