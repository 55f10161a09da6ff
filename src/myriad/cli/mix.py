"""`myriad mix`: separately trained experts in, one model out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from myriad.models import ExpertRouting


def mix(
    words: list[str] = typer.Argument(
        metavar="RUN... [routing.key=value ...]",
        help="The experts: run folders, checkpoints, Hugging Face folders; then settings of the routing, such as "
        "routing.temperature=0.05.",
    ),
    routing: str = typer.Option(help="How a text is shared among the experts: posterior, cluster, expert_choice."),
    out: Path = typer.Option(help="The mixture's folder. It must not exist, or be empty."),
    clusters: Path = typer.Option(
        None, metavar="DIR", help="What `myriad data cluster` made; the experts stand in the order of its stores."
    ),
    top_k: int = typer.Option(None, help="Experts with a weight at each position. Default: the routing's own."),
    data: Path = typer.Option(
        None, metavar="STORE", help="What `myriad eval` measures the mixture on. Default: the store that was clustered."
    ),
) -> None:
    """Make one model of experts that were trained apart. Nothing is trained."""
    from myriad.checkpoint import read_config
    from myriad.data.clusters import Clusters
    from myriad.data.store import Store
    from myriad.models import TransformerExpertsConfig
    from myriad.train.mix import mix as mix_runs

    runs = [Path(word) for word in words if "=" not in word or Path(word).exists()]
    opened = None if clusters is None else Clusters.open(clusters)
    settings: dict[str, Any] = {} if top_k is None else {"top_k": top_k}
    chosen = resolve_routing(routing, settings, [word for word in words if Path(word) not in runs])
    if data is not None:
        Store.open(data)
    mix_runs(runs, out, chosen, clusters=opened, data=data)
    config = read_config(out)
    assert isinstance(config, TransformerExpertsConfig)
    cost = config.cost()
    typer.echo(
        f"{out}: {config.experts} experts, {cost.parameters:,} parameters, {cost.active_parameters:,} of them active, "
        f"routing {routing}"
    )


def resolve_routing(kind: str, settings: dict[str, Any], words: Sequence[str] = ()) -> ExpertRouting:
    """The routing that a word names, with settings.

    Raises:
        ConfigError: there is none of that name, or it has no such setting.
    """
    from myriad.config import ConfigError, apply_overrides, nearest, parse_overrides, validate
    from myriad.models import ExpertRouting

    if kind not in ExpertRouting.kinds:
        known = ", ".join(ExpertRouting.kinds)
        raise ConfigError(f"--routing: unknown kind '{kind}'{nearest(kind, ExpertRouting.kinds)} (known: {known})")
    changes = parse_overrides(words)
    for path in changes:
        if not path.startswith("routing."):
            raise ConfigError(f"{path}: not a setting of the routing (routing.key=value)")
    raw = apply_overrides({"routing": {"kind": kind, **settings}}, changes)
    return validate(ExpertRouting.kinds[kind], raw["routing"])
