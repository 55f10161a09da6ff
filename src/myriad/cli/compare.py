"""`myriad compare`: which feed-forward layer is better at the same compute, from presets to a report.

Every contender is trained on the same tokens in the same order, under the same schedule and budget, over several
seeds; the table, the plot and the report say what each cost and reached.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from myriad.analysis.compare.conduct import Conducted, Work
    from myriad.analysis.compare.plan import Budget, Plan
    from myriad.analysis.compare.standings import Standings
    from myriad.analysis.routing import LayerUsage
    from myriad.train import RunConfig

ONE = "--one"
"""By which a comparison calls this command for one of its runs."""
USAGE_TOKENS = 32_768
WIDTH = 160
"""Columns where the output is no terminal."""


def compare(
    command: typer.Context,
    words: list[str] = typer.Argument(
        metavar="PRESET|CONFIG.yaml|LIST.yaml... [key.path=value ...]",
        help="The contenders: presets, run configs, run folders, files that list contenders, or the first part of "
        "presets' names for all of them (demo); then settings to change in all, such as optim.warmup=50.",
    ),
    budget: list[str] = typer.Option(
        [],
        "--budget",
        metavar="1e15flops|200e6tokens",
        help="What each run may use, in training FLOPs or tokens. Several give isoFLOP curves. Default: the "
        "contenders' own, in tokens.",
    ),
    seeds: int = typer.Option(3, help="Runs of each contender on each budget."),
    sweep_lr: bool = typer.Option(
        False, "--sweep-lr", help="First try half and twice each contender's learning rates, on a fifth of the budget."
    ),
    allow: list[str] = typer.Option(
        [], "--allow", metavar="key.path", help="A setting in which contenders may differ, such as model.context."
    ),
    out: Path = typer.Option(Path("runs/compare"), help="Where to put runs, table, plot and report."),
    kernels: str = typer.Option(None, help="auto, reference, ...; default: as before when resuming, else auto."),
    jobs: int = typer.Option(1, help="How many runs to train at a time, each in a process of its own."),
    quiet: bool = typer.Option(False, "--quiet", help="Show no progress."),
    one: bool = typer.Option(False, ONE, hidden=True, help="Train the run that standard input describes, for --jobs."),
) -> None:
    """Compare feed-forward layers at the same compute. Called again, it goes on where it stopped."""
    if one:
        from myriad.analysis.compare.worker import work

        work()
        return
    from myriad.analysis.compare.board import TerminalBoard
    from myriad.analysis.compare.conduct import Stopped, conduct, opened

    workers = _workers(jobs, _imports(command))
    plan = _plan(words, budget, seeds, sweep_lr, allow)
    again = shlex.join(_again(_imports(command), words, budget, seeds, sweep_lr, allow, out, jobs))
    with opened(out, plan):
        try:
            with TerminalBoard(_console(stderr=True, quiet=quiet)) as board:
                conducted = conduct(plan, out, board, kernels, workers)
        except Stopped as stopped:
            typer.echo(f"{stopped}; to continue: {again}")
            return
        _report(conducted, out, again)


def _imports(command: typer.Context) -> list[str]:
    """The options of `myriad` that import the user's modules."""
    modules = command.parent.params.get("imports", []) if command.parent else []
    return [word for module in modules for word in ("--import", module)]


def _workers(jobs: int, imports: Sequence[str]) -> Work:
    """What trains the runs: this process one after another, or several of their own.

    Raises:
        ConfigError: it cannot be so many.
    """
    from myriad.analysis.compare.conduct import in_turn
    from myriad.analysis.compare.crew import Crew
    from myriad.config import ConfigError

    if jobs < 1:
        raise ConfigError(f"--jobs: expected 1 or more, found {jobs}")
    return in_turn if jobs == 1 else Crew(jobs, [sys.executable, "-m", "myriad", *imports, "compare", ONE])


def _console(**options: Any) -> Console:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True, **options)


def _plan(words: Sequence[str], budgets: Sequence[str], seeds: int, sweep_lr: bool, allow: Sequence[str]) -> Plan:
    """The plan that the words name.

    Raises:
        ConfigError: it cannot be.
    """
    from myriad.analysis.compare.plan import Budget, Plan
    from myriad.config import ConfigError, validate
    from myriad.distributed import LAUNCHED

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and all(name in os.environ for name in LAUNCHED):
        raise ConfigError("compare: trains each run in one process; start it without torchrun")
    if seeds < 1:
        raise ConfigError(f"--seeds: expected 1 or more, found {seeds}")
    contenders = resolve_contenders([word for word in words if "=" not in word], [w for w in words if "=" in w])
    chosen = [Budget.parse(text) for text in budgets] or [_own_budget(contenders)]
    settings = {"contenders": contenders, "budgets": chosen, "seeds": seeds, "sweep_lr": sweep_lr, "allow": allow}
    return validate(Plan, settings)


def _own_budget(contenders: dict[str, RunConfig]) -> Budget:
    """The training tokens that all contenders' configs name."""
    from myriad.analysis.compare.plan import Budget
    from myriad.config import ConfigError

    own = {run.budget.tokens or run.batch.tokens * (run.budget.steps or 0) for run in contenders.values()}
    if len(own) != 1 or not all(own):
        raise ConfigError("--budget: missing; the contenders' own are not equally many tokens")
    return Budget(amount=own.pop(), unit="tokens")


def resolve_contenders(words: Iterable[str], overrides: Sequence[str]) -> dict[str, RunConfig]:
    """The contenders that words on the command line name, with settings changed in all of them.

    Raises:
        ConfigError: an unknown name, with the nearest, or a name that is taken twice.
    """
    from myriad import presets
    from myriad.config import ConfigError

    contenders: dict[str, RunConfig] = {}
    for word in words:
        family = [name for name in presets.names() if name.startswith(f"{word}-")]
        if word not in presets.names() and family and not Path(word).exists():
            found = [_resolve(name, overrides) for name in family]
        elif (listed := _listed(Path(word))) is not None:
            found = [(name, _resolve(target, [*own, *overrides])[1]) for name, (target, *own) in listed.items()]
        else:
            found = [_resolve(word, overrides)]
        for name, run in found:
            if name in contenders:
                raise ConfigError(f"contenders: two are called '{name}'; a file that lists contenders gives them names")
            contenders[name] = run
    return contenders


def _resolve(target: str, overrides: Sequence[str]) -> tuple[str, RunConfig]:
    """A contender's name and its settings, which name no folder."""
    from myriad.cli.train import resolve_run

    run, name = resolve_run(target, list(overrides))
    return name, run.model_copy(update={"out": None})


def _listed(path: Path) -> dict[str, list[str]] | None:
    """Name -> the words that `myriad train` would take, if a file lists contenders.

    Raises:
        ConfigError: it lists something else.
    """
    from myriad.config import ConfigError, load_yaml

    if path.suffix not in (".yaml", ".yml", ".json") or not path.is_file():
        return None
    raw = load_yaml(path)
    if "contenders" not in raw:
        return None
    contenders = raw["contenders"]
    if len(raw) > 1 or not isinstance(contenders, dict) or not contenders:
        raise ConfigError(f"{path}: expected `contenders`, a mapping of names, and nothing beside it")
    listed: dict[str, list[str]] = {}
    for name, text in contenders.items():
        try:
            words = shlex.split(text) if isinstance(text, str) else []
        except ValueError as error:
            raise ConfigError(f"{path}: contenders.{name}: {error}") from None
        if not words or "=" in words[0] or not all("=" in word for word in words[1:]):
            raise ConfigError(f"{path}: contenders.{name}: expected a preset or a file and key.path=value words")
        beside = path.parent / words[0]
        listed[str(name)] = [str(beside) if beside.exists() else words[0], *words[1:]]
    return listed


def _again(
    imports: Sequence[str],
    words: Sequence[str],
    budgets: Sequence[str],
    seeds: int,
    sweep_lr: bool,
    allow: Sequence[str],
    out: Path,
    jobs: int,
) -> list[str]:
    """The command that goes on with this comparison, or makes it anew elsewhere."""
    line = ["myriad", *imports, "compare", *words]
    for budget in budgets:
        line += ["--budget", budget]
    line += ["--seeds", str(seeds), *(["--sweep-lr"] if sweep_lr else [])]
    for setting in allow:
        line += ["--allow", setting]
    return [*line, "--out", str(out), *(["--jobs", str(jobs)] if jobs > 1 else [])]


def _report(conducted: Conducted, out: Path, again: str) -> None:
    """Write all that a comparison gives, and show the table."""
    from myriad.analysis.compare.page import write_page
    from myriad.analysis.compare.standings import load_courses, load_standings, verdicts
    from myriad.analysis.compare.tables import clocks, to_csv, to_json, to_markdown
    from myriad.analysis.plots import loss_against_flops

    standings = load_standings(conducted, out)
    courses = load_courses(standings, conducted, out)
    (out / "results.md").write_text(to_markdown(standings, conducted), encoding="utf-8")
    (out / "results.csv").write_text(to_csv(standings), encoding="utf-8")
    (out / "results.json").write_text(to_json(standings, conducted, again), encoding="utf-8")
    (out / "configs").mkdir(exist_ok=True)
    for name, run in conducted.plan.contenders.items():
        (out / "configs" / f"{name}.yaml").write_text(run.to_yaml(), encoding="utf-8")
    loss_against_flops(courses, out / "loss-against-flops.png")
    write_page(
        out / "report.html",
        title=f"Comparison: {', '.join(conducted.plan.contenders)}",
        standings=standings,
        conducted=conducted,
        courses=courses,
        usages=_usages(conducted, out),
        commands=[again],
    )
    console = _console()
    if not console.is_terminal:
        console.width = WIDTH
    _print_table(console, standings)
    for sentence in (*clocks(conducted), *verdicts(standings)):
        typer.echo(sentence)
    typer.echo(f"{out / 'report.html'}, results.md, results.csv, results.json, loss-against-flops.png: written")


def _usages(conducted: Conducted, out: Path) -> dict[str, list[LayerUsage]]:
    """How the first run of each contender on the last budget uses its experts."""
    from myriad.analysis.compare.conduct import RUNS
    from myriad.analysis.routing import batches, usage
    from myriad.checkpoint import load

    usages: dict[str, list[LayerUsage]] = {}
    for trial, outcome in conducted.trials:
        last = trial.budget == conducted.plan.budgets[-1] and trial.run.seed == conducted.plan.first_seed
        if last and outcome.diverged is None and trial.run.model.cost().routing:
            model = load(out / RUNS / trial.name)
            tokens = conducted.store.split(conducted.split).tokens
            usages[trial.contender] = usage(model, batches(tokens, model.config.context, limit=USAGE_TOKENS))
    return usages


def _print_table(console: Console, standings: Standings) -> None:
    from rich import box
    from rich.table import Table

    from myriad.analysis.compare.tables import columns, rows

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for place, column in enumerate(columns(standings)):
        style = "bold" if column.decisive else ""
        table.add_column(column.heading, justify="right" if place else "left", style=style)
    for row in rows(standings):
        table.add_row(*row)
    console.print(table)
