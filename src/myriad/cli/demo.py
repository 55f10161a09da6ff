"""`myriad demo`: the main job on an embedded corpus, from text to a report; `myriad demo pyper`: a mixture's.

Prepares the Python standard library's own sources, trains a small PEER model and its dense twin of equal FLOPs
per token, evaluates both on held-out text, samples, and writes `report.html` and `curves.png`.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from myriad.analysis.compare import Contender
    from myriad.analysis.report import Sample
    from myriad.evaluate import Perplexity

CONTENDERS = {"PEER": "demo-peer", "dense": "demo-dense"}
HELD_OUT = "test"
PROMPTS = ("def ", "import os\n\n", "class Parser:\n    ")
USAGE_TOKENS = 32_768
PYPER = "pyper"


def demo(
    out: Path = typer.Option(None, help="Where to put everything. Default: runs/demo or runs/demo-pyper."),
    words: list[str] = typer.Argument(
        None,
        metavar="[pyper] [key.path=value ...]",
        help="Settings to change in all runs, such as budget.tokens=2e6. After `pyper`: those of a mixture of eight "
        "transformers and a dense model of the same training compute.",
    ),
) -> None:
    """Train PEER against a dense twin on the standard library's sources, and report; or, after the word `pyper`, mix
    eight transformers that are trained apart, beside a dense one. Resumes if interrupted."""
    first, *rest = words or [""]
    if first == PYPER:
        from myriad.cli.demo_pyper import demo_pyper

        demo_pyper(out or Path("runs/demo-pyper"), rest)
    else:
        _demo(out or Path("runs/demo"), words)


def _demo(out: Path, overrides: list[str]) -> None:
    import time

    from myriad.analysis.curve import LearningCurve
    from myriad.cli.train import resolve_run
    from myriad.train import fit
    from myriad.train.record import Terminal

    started = time.perf_counter()
    folders = {name: out / preset for name, preset in CONTENDERS.items()}
    for name, preset in CONTENDERS.items():
        run, _ = resolve_run(preset, [*(overrides or []), f"out={folders[name]}"])
        outcome = fit(run, folders[name], resume=True, display=Terminal(name), trackers=[LearningCurve])
        if not outcome.finished:
            again = shlex.join(["myriad", "demo", "--out", str(out), *(overrides or [])])
            typer.echo(f"{folders[name]}: saved ({outcome.reason}); to continue: {again}")
            return
    _report(out, folders, [shlex.join(["myriad", "demo", *(overrides or [])])])
    typer.echo(f"done in {time.perf_counter() - started:.0f} s: {out / 'report.html'} and {out / 'curves.png'}")


def _report(out: Path, folders: dict[str, Path], commands: list[str]) -> None:
    """Evaluate both on held-out text, sample from the first, and write the report and the curves."""
    from myriad.analysis.compare import load_contender, load_curve, summary
    from myriad.analysis.plots import loss_curves
    from myriad.analysis.report import describe_corpus, write_report
    from myriad.analysis.routing import batches, usage
    from myriad.checkpoint import load
    from myriad.data.store import Store

    typer.echo(f"evaluating on the {HELD_OUT} split ...")
    first = next(iter(folders))
    contenders = [load_contender(folder, name, _held_out(folder), HELD_OUT) for name, folder in folders.items()]
    for contender in contenders:
        _say(contender)
    store = Store.open(contenders[0].sessions[-1]["data"]["path"])
    model = load(folders[first])
    seen = batches(store.split(HELD_OUT).tokens, model.config.context, limit=USAGE_TOKENS)
    usages = {first: usage(model, seen)}
    curves = [load_curve(folder, name) for name, folder in folders.items()]
    loss_curves(curves, out / "curves.png")
    typer.echo("sampling ...")
    write_report(
        out / "report.html",
        title="Myriad demo: PEER against a dense twin",
        contenders=contenders,
        curves=curves,
        usages=usages,
        samples=_sample(first, folders[first]),
        corpus=describe_corpus(store),
        commands=commands,
    )
    for line in summary(contenders):
        typer.echo(line)


def _held_out(folder: Path) -> Perplexity:
    from myriad.analysis.measure import measure_run
    from myriad.checkpoint import load
    from myriad.cli.evaluate import progress_bar

    context = load(folder).config.context
    with progress_bar(folder.name) as progress:
        return measure_run(folder, split=HELD_OUT, stride=context, progress=progress).perplexity


def _say(contender: Contender) -> None:
    found = contender.perplexity
    typer.echo(
        f"{contender.name}: {found.bits_per_byte:.4f} bits per byte, token perplexity {found.token_perplexity:.2f}, "
        f"{contender.cost.flops / 1e6:.2f} M FLOPs per token"
    )


def _sample(name: str, folder: Path) -> list[Sample]:
    from myriad.analysis.report import Sample
    from myriad.hf.generation import generate_text, open_model

    opened = open_model(folder)
    samples = []
    for seed, prompt in enumerate(PROMPTS):
        (made,) = generate_text(opened, prompt, max_tokens=120, temperature=0.8, top_p=0.95, seed=seed)
        settings = f"temperature 0.8, top-p 0.95, seed {seed}"
        samples.append(Sample(name, prompt, made.text, settings))
    return samples
