"""The command line: one file per verb, each of which imports what is heavy only when it runs.

A fault that the user can mend is one line on stderr and exit code 2; a fault during a run, exit code 1.
"""

import importlib
import os
import sys

import typer

from myriad.cli import config, data, demo, evaluate, generate, presets, train

app = typer.Typer(
    help="Language models whose feed-forward layers are mixtures of experts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command(name="train")(train.train)
app.command(name="eval")(evaluate.evaluate)
app.command(name="generate")(generate.generate)
app.command(name="demo")(demo.demo)
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


def main() -> None:
    """Run the command line."""
    # Read by OpenMP when torch is loaded. Threads that spin long while they wait make a run several times slower
    # where it shares its cores with other work; a short spin costs nothing measurable where it does not.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    try:
        app()
    except Exception as error:
        from myriad.config import MyriadError

        if isinstance(error, MyriadError):
            _fail(str(error), error.exit_code)
        if isinstance(error, OSError):  # a full disk, a folder that cannot be written
            _fail(f"{error.filename or 'input or output'}: {error.strerror or error}", 1)
        raise


def _fail(message: str, code: int) -> None:
    for line in message.splitlines():
        print(f"myriad: {line}", file=sys.stderr)
    sys.exit(code)
