"""The verbs of the command line, put together."""

import importlib
import sys

import typer

from myriad.cli import bench, compare, config, data, demo, evaluate, generate, inspect, mix, plan, presets, pyper, train

app = typer.Typer(
    help="Language models whose feed-forward layers are mixtures of experts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command(name="train")(train.train)
app.command(name="mix")(mix.mix)
app.command(name="eval")(evaluate.evaluate)
app.command(name="inspect")(inspect.inspect)
app.command(name="generate")(generate.generate)
app.command(name="compare")(compare.compare)
app.command(name="pyper")(pyper.pyper)
app.command(name="demo")(demo.demo)
app.command(name="bench")(bench.bench)
app.command(name="plan")(plan.plan)
app.command(name="presets")(presets.presets)
app.add_typer(data.app, name="data")
app.add_typer(config.app, name="config")


def _show_version(asked: bool) -> None:
    if asked:
        from myriad import __version__

        typer.echo(f"myriad {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
    ),
    imports: list[str] = typer.Option(
        [], "--import", metavar="MODULE", help="Import a module of your own first, which registers layers of its own."
    ),
) -> None:
    """Language models whose feed-forward layers are mixtures of experts."""
    for module in imports:
        _import_users_module(module)


def _import_users_module(module: str) -> None:
    from myriad.config import ConfigError

    sys.path.insert(0, "")
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"--import {module}: {error}") from None
