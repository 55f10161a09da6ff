"""What an inspection found, as a page, as PNGs and as JSON."""

import json
from collections.abc import Callable
from pathlib import Path

from myriad.analysis.heads import LayerHeads
from myriad.analysis.inspection import Inspection
from myriad.analysis.plots import expert_usage, head_overlap, router_entropy, weight_by_rank
from myriad.analysis.report import describe_usage, draw_picture, number, percent, render
from myriad.analysis.routing import LayerUsage
from myriad.checkpoint import naming


def write_inspection(folder: Path, found: Inspection, command: str) -> None:
    """Write `report.html`, `routing.json`, `usage.png`, `weights.png`, `entropy.png` and `overlap.png`.

    Args:
        folder: made if need be; files of these names are replaced.
        found: from `inspect_run`.
        command: which the reader types to see the same again.

    Raises:
        RunError: a file cannot be written.
    """
    usages, heads = _parts(found)
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        expert_usage(usages, folder / "usage.png")
        weight_by_rank(heads, folder / "weights.png")
        router_entropy(heads, folder / "entropy.png")
        head_overlap(heads, folder / "overlap.png")
        content = found.record() | {"command": command}
        (folder / "routing.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        _write_page(folder / "report.html", found, command)


def _write_page(path: Path, found: Inspection, command: str) -> None:
    usages, heads = _parts(found)
    render(
        path,
        "inspection.html.jinja",
        title=f"Routing of {found.run}",
        verdicts=[describe(found)],
        found=found,
        usages=usages,
        heads=heads,
        several=[layer for layer in heads if layer.heads > 1],
        usage_figure=draw_picture(expert_usage, usages, describe_usage(usages)),
        weight_figure=draw_picture(weight_by_rank, heads, _describe_weights(heads)),
        entropy_figure=draw_picture(router_entropy, heads, _describe_entropy(heads)),
        overlap_figure=draw_picture(head_overlap, heads, _describe_overlap(heads)),
        command=command,
    )


def _parts(found: Inspection) -> tuple[list[LayerUsage], list[LayerHeads]]:
    return [layer.usage for layer in found.layers], [layer.heads for layer in found.layers]


def describe(found: Inspection) -> str:
    """One sentence: what was looked at, and how much of the experts it used."""
    number_of_layers = len(found.layers)
    used = _range([layer.usage.share_used for layer in found.layers], percent)
    unevenness = _range([layer.usage.unevenness for layer in found.layers], number)
    uses = f"the {number_of_layers} routed layers use {used} of their"
    if number_of_layers == 1:
        uses = f"the routed layer uses {used} of its"
    return (
        f"Over {found.tokens:,} tokens of the {found.split} split, {uses} experts, with an unevenness of "
        f"{unevenness} nats."
    )


def _range(values: list[float], show: Callable[[float], str]) -> str:
    low, high = show(min(values)), show(max(values))
    return low if low == high else f"{low} to {high}"


def _describe_weights(layers: list[LayerHeads]) -> str:
    shares = [f"{layer.name}: {percent(float(layer.weight_by_rank[0]))}" for layer in layers]
    return f"Mean share of router weight by rank. The heaviest expert's share is, by layer, {'; '.join(shares)}."


def _describe_entropy(layers: list[LayerHeads]) -> str:
    parts = [f"{layer.name}: {number(layer.mean_entropy)} of {number(layer.largest_entropy)}" for layer in layers]
    return f"Mean entropy of router weights of each layer, in nats. {'; '.join(parts)}."


def _describe_overlap(layers: list[LayerHeads]) -> str:
    overlaps = [(layer.name, layer.overlap()) for layer in layers]
    parts = [f"{name}: {number(overlap[0])}" for name, overlap in overlaps if overlap is not None]
    return f"Experts of a token that two heads have in common, mean over the pairs of heads. {'; '.join(parts)}."
