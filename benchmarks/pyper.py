"""What a mixture of transformers that choose takes beside a dense transformer of the same active FLOPs, in training.

    python benchmarks/pyper.py --preset pyper-demo --rounds 21 --out RESULT.json

A step is forward, backward and the update of all parameters. Every round times both models, the dense one first and
last, and divides the mixture's tokens per second by the mean of the dense model's: what slows the machine for longer
than a round slows both sides. Reported are the median of the ratios and their quartiles.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from myriad import presets
from myriad.ffn import DenseConfig
from myriad.kernels.hardware import processor
from myriad.models import ExpertChoiceRouting, ModelConfig, TransformerConfig, TransformerExpertsConfig
from myriad.train.optim import build_optimizer, clip_gradients

Step = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="pyper-demo", help="of which the model is")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--context", type=int, help="default: the preset's")
    parser.add_argument("--d-model", type=int, help="default: the preset's")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    mixture = mixture_of(options)
    dense = dense_twin(mixture)
    rows = [measure(mixture, dense, options, precision) for precision in ("float32", "bfloat16")]
    print("| precision | tokens/s | dense tokens/s | ratio | quartiles |\n|---|---|---|---|---|")
    for row in rows:
        low, high = row["quartiles"]
        print(
            f"| {row['precision']} | {row['tokens_per_second']:,.0f} | {row['dense_tokens_per_second']:,.0f} "
            f"| {row['ratio']:.3f} | {low:.3f} to {high:.3f} |"
        )
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {name: value for name, value in vars(options).items() if name != "out"}
        machine = {"device": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        sizes = {name: model.cost()._asdict() for name, model in (("mixture", mixture), ("dense", dense))}
        options.out.write_text(json.dumps({"settings": settings, **machine, **sizes, "rows": rows}, indent=1) + "\n")


def mixture_of(options: argparse.Namespace) -> TransformerExpertsConfig:
    """The preset's model at the sizes asked for."""
    model = presets.get(options.preset).model
    assert isinstance(model, TransformerExpertsConfig)
    context = options.context or model.context
    expert = model.expert.model_copy(update={"d_model": options.d_model or model.expert.d_model, "context": context})
    return model.model_copy(update={"expert": expert, "context": context, "vocab_size": options.vocabulary})


def dense_twin(mixture: TransformerExpertsConfig) -> TransformerConfig:
    """A transformer of as many blocks as a token goes through, as wide as makes its FLOPs equal, to a hidden unit."""
    assert isinstance(mixture.routing, ExpertChoiceRouting)
    blocks = mixture.routing.trunk_layers + mixture.expert.layers
    expert = mixture.whole_expert.model_copy(update={"layers": blocks})

    def of_width(hidden: int) -> TransformerConfig:
        return expert.model_copy(update={"ffns": {"dense": DenseConfig(d_hidden=hidden)}})

    one, two = (of_width(hidden).cost().flops for hidden in (1, 2))
    return of_width(1 + round((mixture.cost().flops - one) / (two - one)))


def measure(mixture: ModelConfig, dense: ModelConfig, options: argparse.Namespace, precision: str) -> dict:
    """The mixture's tokens per second beside the dense model's."""
    mine, theirs = (step_of(model, options, precision) for model in (mixture, dense))
    for step in (theirs, mine, theirs, mine):
        step()
    times = [[seconds(step) for step in (theirs, mine, theirs)] for _ in range(options.rounds)]
    ratios = [(before + after) / (2 * own) for before, own, after in times]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "precision": precision,
        "tokens_per_second": options.tokens / statistics.median(own for _, own, _ in times),
        "dense_tokens_per_second": options.tokens / statistics.median(before for before, _, _ in times),
        "ratio": statistics.median(ratios),
        "quartiles": [quartiles[0], quartiles[2]],
    }


def step_of(config: ModelConfig, options: argparse.Namespace, precision: str) -> Step:
    """A step of training on random tokens: a mixture's work does not depend on which they are."""
    torch.manual_seed(0)
    model = config.build()
    optimizer = build_optimizer(model)
    ids = torch.randint(config.vocabulary, (options.tokens // config.context, config.context))
    targets = ids.roll(-1, 1)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            output = model(ids, targets=targets)
        (output.loss / ids.numel() + output.aux_loss).backward()
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        model.after_step(output.loads)
        optimizer.zero_grad(set_to_none=True)

    return step


def seconds(step: Step) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
