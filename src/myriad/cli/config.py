"""`myriad config`: settings as YAML, and their schema."""

import typer

app = typer.Typer(help="Show settings and their schema.", no_args_is_help=True)


@app.command()
def show(
    target: str = typer.Argument(metavar="PRESET|CONFIG.yaml|RUN", help="Whose settings."),
    overrides: list[str] = typer.Argument(None, metavar="[key.path=value ...]", help="Settings to change."),
) -> None:
    """Print the resolved settings, a valid config file again."""
    from myriad.cli.train import resolve_run

    run, _ = resolve_run(target, overrides or [])
    typer.echo(run.to_yaml(), nl=False)


@app.command()
def schema() -> None:
    """Print the JSON schema of a run's settings, for editors."""
    import json

    from myriad.config import json_schema
    from myriad.train import RunConfig

    typer.echo(json.dumps(json_schema(RunConfig), indent=2))
