"""What mixtures of experts take beside a dense layer of the same active FLOPs: forward and backward, interleaved.

    python benchmarks/mixtures.py --tokens 4096 --d-model 256 --experts 8 --per-token 2 --rounds 21 --out RESULT.json

Every round times each layer once, the dense one first and last, and divides by the mean of these two: what slows the
machine for longer than a round slows both sides. Reported are the median of the ratios and their quartiles.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from myriad.ffn import DenseConfig, ExpertChoiceConfig, FFNConfig, TokenChoiceConfig
from myriad.kernels.hardware import processor

Step = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--per-token", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--activation", choices=["gelu", "relu", "swiglu"], default="gelu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = [row for precision in ("float32", "bfloat16") for row in measure(options, precision)]
    print("| layer | precision | ms | dense ms | ratio | quartiles |\n|---|---|---|---|---|---|")
    for row in found:
        low, high = row["quartiles"]
        print(
            f"| {row['layer']} | {row['precision']} | {row['ms']:.1f} | {row['dense_ms']:.1f} "
            f"| {row['ratio']:.3f} | {low:.3f} to {high:.3f} |"
        )
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {name: value for name, value in vars(options).items() if name != "out"}
        machine = {"device": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        options.out.write_text(json.dumps({"settings": settings, **machine, "rows": found}, indent=1) + "\n")


def layers(options: argparse.Namespace) -> tuple[FFNConfig, dict[str, FFNConfig]]:
    """The dense layer, and mixtures whose experts of a token together are as wide."""
    shape = {"experts": options.experts, "activation": options.activation}
    mixtures = {
        "token choice": TokenChoiceConfig(experts_per_token=options.per_token, **shape),
        "expert choice": ExpertChoiceConfig(capacity_factor=options.per_token, **shape),
        "expert choice by thresholds": ExpertChoiceConfig(
            capacity_factor=options.per_token, threshold_after=1, threshold_decay=0, **shape
        ),
    }
    return DenseConfig(activation=options.activation), mixtures


def measure(options: argparse.Namespace, precision: str) -> list[dict]:
    """A row of figures for each mixture."""
    dense_config, mixtures = layers(options)
    dense = step_of(dense_config, options, precision)
    rows = []
    for name, config in mixtures.items():
        mixture = step_of(config, options, precision)
        for step in (dense, mixture, dense, mixture):
            step()
        times = [[seconds(step) for step in (dense, mixture, dense)] for _ in range(options.rounds)]
        ratios = [2 * mine / (before + after) for before, mine, after in times]
        quartiles = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "layer": name,
                "precision": precision,
                "ms": 1e3 * statistics.median(mine for _, mine, _ in times),
                "dense_ms": 1e3 * statistics.median(before for before, _, _ in times),
                "ratio": statistics.median(ratios),
                "quartiles": [quartiles[0], quartiles[2]],
            }
        )
    return rows


def step_of(config: FFNConfig, options: argparse.Namespace, precision: str) -> Step:
    """Forward and backward of a fresh layer, with gradients to the input, too."""
    torch.manual_seed(0)
    layer = config.build(options.d_model)
    x = torch.randn(options.tokens, options.d_model, requires_grad=True)
    upstream = torch.randn(options.tokens, options.d_model)
    layer.after_step(layer(x).load)

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            output = layer(x)
        torch.autograd.backward([output.y, output.aux_loss], [upstream.to(output.y.dtype), None])

    def step_without_loss() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            y = layer(x).y
        y.backward(upstream.to(y.dtype))

    return step if layer(x).aux_loss.requires_grad else step_without_loss


def seconds(step: Step) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
