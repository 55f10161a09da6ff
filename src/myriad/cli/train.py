"""`myriad train`: a preset, a config file or a run folder in, a run folder out."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from myriad.train import RunConfig
    from myriad.train.loop import Outcome


def train(
    command: typer.Context,
    target: str = typer.Argument(metavar="PRESET|CONFIG.yaml|RUN", help="What to train."),
    overrides: list[str] = typer.Argument(
        None, metavar="[key.path=value ...]", help="Settings to change, such as budget.steps=1000 or out=runs/a."
    ),
    resume: bool = typer.Option(False, "--resume", help="Continue the run from its newest intact checkpoint."),
    kernels: str = typer.Option(None, help="auto, reference, ...; default: as before when resuming, else auto."),
    track: list[str] = typer.Option(
        [], "--track", metavar="TRACKER", help="tensorboard or wandb: also send the figures there. May be repeated."
    ),
    quiet: bool = typer.Option(False, "--quiet", help="Show no progress."),
) -> None:
    """Train a model. Ctrl-C or SIGTERM finishes the step, saves, and says how to go on."""
    from myriad.analysis.curve import LearningCurve
    from myriad.distributed import joined, rank
    from myriad.train import fit
    from myriad.train.record import Silent, Terminal
    from myriad.train.trackers import named

    with joined():
        trackers = [LearningCurve, *named(track)]
        run, name = resolve_run(target, overrides or [])
        out = Path(run.out or f"runs/{name}")
        display = Silent() if quiet or rank() else Terminal(name)
        outcome = fit(run, out, resume=resume, kernel=kernels, display=display, trackers=trackers)
        if rank() == 0:
            imports = command.parent.params.get("imports", []) if command.parent else []
            typer.echo(_end(out, outcome, imports))


def _end(out: Path, outcome: Outcome, imports: list[str]) -> str:
    """How a session ended, and how to go on from there."""
    if outcome.finished:
        best = "" if outcome.best_loss is None else f", best validation loss {outcome.best_loss:.4f}"
        return f"{out}: finished after step {outcome.step} ({outcome.reason}){best}"
    options = [word for module in imports for word in ("--import", module)]
    again = shlex.join([*_command(), *options, "train", str(out), "--resume"])
    return f"{out}: saved ({outcome.reason}); to continue: {again}"


def _command() -> list[str]:
    """How this program was called: under torchrun where that has started several processes."""
    from myriad.distributed import world_size

    if world_size() == 1:
        return ["myriad"]
    here = os.environ.get("LOCAL_WORLD_SIZE", str(world_size()))
    return ["torchrun", "--nproc-per-node", here, "-m", "myriad"]


def resolve_run(target: str, overrides: list[str]) -> tuple[RunConfig, str]:
    """The settings that a word on the command line names, with overrides applied, and a name for them.

    Raises:
        ConfigError: neither a preset nor a file nor a run folder, or settings that cannot be.
    """
    from myriad import presets
    from myriad.checkpoint import newest_file
    from myriad.config import ConfigError, load_yaml, nearest
    from myriad.train import with_overrides

    path = Path(target)
    if path.is_dir():
        # The folder itself shows the best weights; settings changed on a later resume are in the newest checkpoint.
        raw = load_yaml(newest_file(path, "run.json"))
        raw["out"] = target
        return with_overrides(raw, overrides), path.resolve().name
    if path.suffix in (".yaml", ".yml", ".json") or path.is_file():
        return with_overrides(load_yaml(path), overrides), path.stem
    if target in presets.names():
        return with_overrides(presets.get(target).model_dump(mode="json"), overrides), target
    known = presets.names()
    hint = nearest(target, known)
    raise ConfigError(f"'{target}': neither a preset, a file nor a run folder{hint} (presets: {', '.join(known)})")
