"""What the presets take on this machine: parameters, peak memory, tokens/s of training.

    python benchmarks/hardware.py peer-256x256 dense-256x256 --tokens 8192 --steps 5 --out benchmarks/results/NAME.json

Each preset trains a few steps in a process of its own, on random letters, with its own vocabulary, layers and
context; steps are shortened to `--tokens`. Tokens/s is the median over the steps but the first.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

GPT2_VOCABULARY = 50257


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="+")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a step")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.presets[0], options.tokens, options.steps)))
        return
    found = [in_a_process(name, options.tokens, options.steps) for name in options.presets]
    print("| preset | parameters | active | MFLOPs/token | peak memory | tokens/s |\n|---|---|---|---|---|---|")
    for row in found:
        print(
            f"| `{row['preset']}` | {row['parameters'] / 1e6:,.1f} M | {row['active_parameters'] / 1e6:.1f} M "
            f"| {row['flops'] / 1e6:.1f} | {row['peak_memory'] / 1e9:.1f} GB | {row['tokens_per_second']:,.0f} |"
        )
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def in_a_process(name: str, tokens: int, steps: int) -> dict:
    """Measure in a fresh process, whose peak memory is this preset's alone."""
    command = [sys.executable, __file__, name, "--here", "--tokens", str(tokens), "--steps", str(steps)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, tokens: int, steps: int) -> dict:
    """Train a preset for a few steps."""
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as the command line does, before torch is loaded

    import torch

    from myriad import presets
    from myriad.data.prepare import prepare
    from myriad.data.recipe import Recipe
    from myriad.train import fit, with_overrides
    from myriad.train.record import read_records

    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "letters.txt"
        text.write_text("".join(random.Random(0).choices("abcdefgh \n", k=(steps + 2) * tokens + 200_000)))
        prepare(Recipe(source=str(text), tokenizer="bytes"), Path(folder) / "store")
        run = presets.get(name)
        words = [f"data.path={folder}/store", f"budget.steps={steps}", f"batch.tokens={tokens}"]
        words += ["batch.micro_tokens=null", f"evaluation.tokens={run.model.context}", "optim.warmup=2"]
        words += [f"model.vocab_size={run.model.vocab_size or GPT2_VOCABULARY}"]
        run = with_overrides(run.model_dump(mode="json"), words)
        fit(run, Path(folder) / "run")
        records = list(read_records(Path(folder) / "run" / "metrics.jsonl"))
        session = json.loads((Path(folder) / "run" / "sessions.jsonl").read_text().splitlines()[-1])
    speeds = [record["tokens_per_second"] for record in records if record["kind"] == "train"][1:]
    cost = run.model.cost()
    on_gpu = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "preset": name,
        "parameters": cost.parameters,
        "active_parameters": cost.active_parameters,
        "flops": cost.flops,
        "peak_memory": peak,
        "tokens_per_second": statistics.median(speeds),
        "slowest_and_fastest": [min(speeds), max(speeds)],
        "tokens_per_step": tokens,
        **{key: session[key] for key in ("device", "threads", "processes", "precision", "kernels", "versions")},
    }


if __name__ == "__main__":
    main()
