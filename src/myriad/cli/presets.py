"""`myriad presets`: what can be trained by name."""

import typer


def presets() -> None:
    """List the presets, with what each costs."""
    from rich.console import Console
    from rich.table import Table

    from myriad import presets as known

    table = Table("preset", "what it is")
    for column in ("parameters", "active", "FLOPs/token"):
        table.add_column(column, justify="right")
    for name in known.names():
        cost = known.get(name).model.cost()
        counts = (cost.parameters, cost.active_parameters, cost.flops)
        table.add_row(name, known.describe(name), *(f"{count / 1e6:,.1f} M" for count in counts))
    Console().print(table)
    typer.echo("FLOPs are of a token's forward at full context. `myriad config show PRESET` prints the settings.")
