"""Eight experts that were trained apart, one dense model and experts that choose: the same training compute, by domain.

    myriad data prepare domains --tokenizer bpe:4096 --out all
    myriad data cluster domains --by field --field domain --tokenizer all/tokenizer.json --out by
    python benchmarks/pyper_domains.py all by --seeds 3 --seed-share 0.5 --out runs --json RESULT.json model.layers=4

`domains` is what domains.py makes. Each seed clusters the text of `all` by content, trains an expert of the preset
pyper-demo-expert on each of eight clusters, and mixes them by their posterior. With the same settings and for as many
steps in all it trains a dense model of an expert's shape, and a mixture with a trunk of half its blocks, whose eight
experts are the other half and choose their tokens at capacity factor 1: a token costs about what it costs the dense
model. Everyone is measured on each domain's held-out text. Words of the form key.path=value change the experts'
settings. What is finished is skipped when called again.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from myriad import presets
from myriad.analysis.compare.board import TerminalBoard
from myriad.analysis.compare.conduct import finish, opened
from myriad.analysis.compare.plan import Trial
from myriad.analysis.measure import measure_run
from myriad.analysis.pyper import MIXTURE, PyperPlan, assemble
from myriad.analysis.pyper_dense import POSTERIOR_TOKENS, dense_training
from myriad.analysis.routing import batches, usage
from myriad.checkpoint import load
from myriad.data.clusters import ClusterOptions, Clusters
from myriad.data.store import Store
from myriad.evaluate import Perplexity
from myriad.kernels.hardware import processor
from myriad.models import ExpertChoiceRouting, PosteriorRouting, TransformerExpertsConfig
from myriad.train import RunConfig, with_overrides

EXPERTS = 8
CONTENDERS = ("dense", "mixture", "chosen")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("domains", type=Path, help="the same text, divided by `myriad data cluster --by field`")
    parser.add_argument("overrides", nargs="*", help="of the experts' settings")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed-share", type=float, default=0.0, help="of the experts' steps, for a common seed model")
    parser.add_argument("--out", type=Path, required=True, help="the folder of all runs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_intermixed_args()
    found = [one_seed(options, seed) for seed in range(options.seeds)]
    settings = {name: str(value) for name, value in vars(options).items() if name not in ("out", "json")}
    machine = {"device": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    if options.json is not None:
        options.json.write_text(json.dumps({"settings": settings, **machine, "seeds": found}, indent=1) + "\n")
    show(found)


def one_seed(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train and measure everyone."""
    out = options.out / f"seed{seed}"
    words = [f"data.path={json.dumps(str(options.store))}", f"seed={seed}", *options.overrides]
    run = with_overrides(presets.get("pyper-demo-expert").model_dump(mode="json"), words)
    plan = PyperPlan(
        run=run,
        clusters=ClusterOptions(clusters=EXPERTS, seed=seed),
        routing=PosteriorRouting(),
        seed_share=options.seed_share,
    )
    with opened(out, plan), TerminalBoard(Console(stderr=True, highlight=False)) as board:
        made = assemble(plan, out, board, None)
        dense = dense_training(plan, made.spent, made.store)
        chosen = Trial("chosen", "all", choosing(dense.run), 1.0, None)
        board.expect([*made.spent, dense, chosen])
        for trial in (dense, chosen):
            finish(trial, out, board, None, None)
    folders = {"dense": out / dense.name, "mixture": out / MIXTURE, "chosen": out / chosen.name}
    domains = Clusters.open(options.domains)
    stores = {entry.name: domains.store_path(n) for n, entry in enumerate(domains.index.clusters)}
    found = {
        name: {on: measured(out, folder, store, made.split) for on, store in stores.items()}
        for name, folder in folders.items()
    }
    return {
        "seed": seed,
        "configs": {"expert": plan.run.digest(), "dense": dense.run.digest(), "chosen": chosen.run.digest()},
        "tokens": {"expert": [trial.tokens for trial in made.spent], "dense": dense.tokens, "chosen": chosen.tokens},
        "parameters": {name: load(folder).config.cost()._asdict() for name, folder in folders.items()},
        "bits_per_byte": {
            name: {on: each.bits_per_byte for on, each in texts.items()} | {"everything": overall(texts.values())}
            for name, texts in found.items()
        },
        "expert_on_its_cluster": [own.bits_per_byte for own in made.own],
        "weights": {
            name: {on: shares(folders[name], store, made.split) for on, store in stores.items()}
            for name in ("mixture", "chosen")
        },
    }


def choosing(dense: RunConfig) -> RunConfig:
    """A dense model's run with the other half of its blocks as experts that choose."""
    model = dense.model
    layers = model.model_dump()["layers"]
    trunk = layers // 2
    expert = model.model_copy(update={"layers": layers - trunk})
    routing = ExpertChoiceRouting(trunk_layers=trunk, capacity_factor=1)
    sizes = {"vocab_size": model.vocabulary, "context": model.context, "experts": EXPERTS}
    mixture = TransformerExpertsConfig.model_validate({**sizes, "expert": expert, "routing": routing})
    return dense.model_copy(update={"model": mixture})


def measured(out: Path, run: Path, store: Path, split: str) -> Perplexity:
    """What a finished run makes of a store; measured once."""
    record = out / f"on-{store.name}-{run.name}.json"
    if not record.exists():
        found = measure_run(run, store, split, stride=load(run).config.context).perplexity
        record.write_text(json.dumps(found._asdict()))
    return Perplexity(**json.loads(record.read_text()))


def overall(texts: Iterable[Perplexity]) -> float:
    """Bits per byte of several texts together."""
    nats, size = (sum(each) for each in zip(*((text.loss * text.tokens, text.bytes) for text in texts), strict=True))
    return nats / size / math.log(2)


def shares(run: Path, store: Path, split: str) -> list[float]:
    """Each expert's share of a text: of the posterior, or of the tokens that were taken."""
    model = load(run)
    ids = batches(Store.open(store).split(split).tokens, model.config.context, limit=POSTERIOR_TOKENS)
    (layer,) = usage(model, ids)
    given = layer.weights if run.name == MIXTURE else layer.counts.double()
    return (given / given.sum()).tolist()


def show(found: list[dict[str, Any]]) -> None:
    """A table: bits per byte, mean and standard deviation over seeds."""
    texts = list(found[0]["bits_per_byte"]["dense"])
    print("| | " + " | ".join(texts) + " |\n|---" + "|---" * len(texts) + "|")
    for name in CONTENDERS:
        cells = []
        for text in texts:
            values = [each["bits_per_byte"][name][text] for each in found]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4f}{spread}")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
