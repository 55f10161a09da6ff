"""How a model uses and weights its experts, layer by layer."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from myriad.analysis.heads import LayerHeads
from myriad.analysis.plots.drawing import (
    DARK,
    LIGHT,
    MAX_LEGEND,
    MAX_MARKERS,
    MAX_POINTS,
    Theme,
    colors_of_depth,
    finish,
    new_figure,
    some,
    style,
    to_png,
)
from myriad.analysis.routing import LayerUsage

MAX_MATRICES = 8
MAX_HEADS_NUMBERED = 8
MAX_HEADS_WRITTEN = 4
"""The cells of a matrix of more heads are too small for numbers."""


def expert_usage(
    layers: Sequence[LayerUsage], path: str | Path | None = None, *, dark: bool = False, stacked: bool = False
) -> bytes:
    """How often each expert was drawn, experts sorted, one line a layer, beside what chance would show.

    The share of draws is in multiples of the uniform share, so that layers of unequal sizes share the axes.

    Args:
        layers: of one model.
        path: where to write the figure too.
        dark: for a dark page.
        stacked: for narrow screens.

    Returns:
        A PNG.
    """
    theme = DARK if dark else LIGHT
    figure = new_figure(theme, stacked, panels=1)
    axes = figure.subplots()
    style(axes, theme, "Usage of experts", "rank of the expert, as a share of all experts", "draws / uniform share")
    colors = colors_of_depth(theme, len(layers))
    named = some(len(layers), MAX_LEGEND)
    for index, layer in enumerate(layers):
        label = layer.name if index in named else None
        axes.plot(*_sorted_usage(layer.counts.numpy()), color=colors[index], linewidth=1.6, label=label)
    if layers:
        axes.set(xscale="log", yscale="log")
        axes.axhline(1, color=theme.faint, linewidth=1, linestyle="--", label="uniform")
        chance = _chance_counts(layers[0])
        axes.plot(*_sorted_usage(chance), color=theme.faint, linewidth=1.2, linestyle=":", label="uniform draws")
    finish(axes, theme, "no routed layer")
    return to_png(figure, path)


def _sorted_usage(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rank as a share of all experts, and draws in multiples of the uniform share; experts never drawn left out.

    Of a large pool only as many ranks are kept as a logarithmic axis can show.
    """
    used = np.sort(counts[counts > 0])[::-1]
    ranks = np.unique(np.geomspace(1, max(len(used), 1), MAX_POINTS).round().astype(np.int64))[: len(used)]
    return ranks / len(counts), used[ranks - 1] * (len(counts) / max(counts.sum(), 1))


def _chance_counts(layer: LayerUsage) -> np.ndarray:
    """Counts of as many draws as a layer made, from a uniform distribution."""
    return np.random.default_rng(0).multinomial(layer.draws, np.full(layer.experts, 1 / layer.experts))


def weight_by_rank(
    layers: Sequence[LayerHeads], path: str | Path | None = None, *, dark: bool = False, stacked: bool = False
) -> bytes:
    """The mean share of a token's router weight against the rank of the expert, one line a layer.

    Args:
        layers: of one model.
        path: where to write the figure too.
        dark: for a dark page.
        stacked: for narrow screens.

    Returns:
        A PNG.
    """
    theme = DARK if dark else LIGHT
    figure = new_figure(theme, stacked, panels=1)
    axes = figure.subplots()
    style(axes, theme, "Router weights", "rank of the expert among a head's", "share of the head's weight")
    colors, named = colors_of_depth(theme, len(layers)), some(len(layers), MAX_LEGEND)
    for index, layer in enumerate(layers):
        label = layer.name if index in named else None
        marker = "o" if layer.slots <= MAX_MARKERS else ""
        ranks = np.arange(1, layer.slots + 1)
        axes.plot(
            ranks, layer.weight_by_rank, color=colors[index], linewidth=1.6, marker=marker, markersize=4, label=label
        )
    for slots in sorted({layer.slots for layer in layers}):
        label = "equal weights" if slots == layers[0].slots else None
        axes.plot([1, slots], [1 / slots] * 2, color=theme.faint, linewidth=1, linestyle="--", label=label)
    most = max((layer.slots for layer in layers), default=1)
    axes.set_xticks([rank + 1 for rank in sorted(some(most, 16))])
    axes.set_ylim(bottom=0)
    finish(axes, theme, "no routed layer")
    return to_png(figure, path)


def router_entropy(
    layers: Sequence[LayerHeads], path: str | Path | None = None, *, dark: bool = False, stacked: bool = False
) -> bytes:
    """The entropy of router weights of each layer: a dot for each head, a line for their mean, dashed the maximum.

    Args:
        layers: of one model.
        path: where to write the figure too.
        dark: for a dark page.
        stacked: for narrow screens.

    Returns:
        A PNG.
    """
    theme = DARK if dark else LIGHT
    figure = new_figure(theme, stacked, panels=1)
    axes = figure.subplots()
    style(axes, theme, "Entropy of router weights", "", "nats")
    if layers:
        _draw_entropies(axes, layers, theme)
        shown = sorted(some(len(layers), 4 if stacked else 12))
        axes.set_xticks(shown, [layers[index].name for index in shown])
        axes.set_ylim(0, 1.12 * max(0.1, *(layer.largest_entropy for layer in layers)))
    finish(axes, theme, "no routed layer")
    return to_png(figure, path)


def _draw_entropies(axes: Axes, layers: Sequence[LayerHeads], theme: Theme) -> None:
    places = np.arange(len(layers))
    largest = [layer.largest_entropy for layer in (*layers, layers[-1])]
    look: dict[str, Any] = {"color": theme.faint, "linewidth": 1, "linestyle": "--"}
    axes.step(np.arange(len(layers) + 1) - 0.5, largest, where="post", label="equal weights", **look)
    means = [layer.mean_entropy for layer in layers]
    axes.plot(places, means, color=theme.runs[0], linewidth=1.8, marker="D", markersize=5, label="mean of heads")
    heads = np.concatenate([np.full(layer.heads, place) for place, layer in zip(places, layers, strict=True)])
    look = {"color": theme.runs[1], "linestyle": "", "marker": "o", "markersize": 4, "alpha": 0.75}
    axes.plot(heads, np.concatenate([layer.entropy for layer in layers]), label="a head", **look)


def head_overlap(
    layers: Sequence[LayerHeads], path: str | Path | None = None, *, dark: bool = False, stacked: bool = False
) -> bytes:
    """How many experts of a token two heads share: a matrix for each layer that has several heads, on one scale.

    Args:
        layers: of one model; of many, some are shown.
        path: where to write the figure too.
        dark: for a dark page.
        stacked: for narrow screens.

    Returns:
        A PNG.
    """
    theme = DARK if dark else LIGHT
    figure = new_figure(theme, stacked, panels=1)
    figure.suptitle("Overlap of heads", x=0.01, ha="left", fontsize=11, color=theme.ink, fontweight="bold")
    several = [layer for layer in layers if layer.heads > 1]
    shown = [several[index] for index in sorted(some(len(several), MAX_MATRICES))]
    if shown:
        _draw_matrices(figure, shown, theme, columns=min(2 if stacked else 4, len(shown)))
    else:
        axes = figure.subplots()
        style(axes, theme, "", "", "")
        finish(axes, theme, "no layer with several heads")
    return to_png(figure, path)


def _draw_matrices(figure: Figure, layers: Sequence[LayerHeads], theme: Theme, columns: int) -> None:
    rows = math.ceil(len(layers) / columns)
    width = figure.get_size_inches()[0]
    figure.set_size_inches(width, 0.5 + rows * min(0.92 * width / columns, 3.0))
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(layers) :]:
        axes.set_visible(False)
    matrices = [_without_diagonal(layer) for layer in layers]
    largest = max(float(np.nanmax(matrix)) for matrix in matrices) or 1.0
    for axes, layer, matrix in zip(panels, layers, matrices, strict=False):
        _draw_matrix(axes, layer, matrix, largest, theme)
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, largest), "viridis"), ax=list(panels[: len(layers)]), shrink=0.85, pad=0.02
    )
    bar.set_label("experts of a token in common", color=theme.faint, fontsize=9)
    bar.ax.tick_params(colors=theme.faint, length=0, labelsize=8)
    bar.ax.spines[:].set_visible(False)


def _without_diagonal(layer: LayerHeads) -> np.ndarray:
    matrix = layer.shared.numpy().copy()
    np.fill_diagonal(matrix, np.nan)
    return matrix


def _draw_matrix(axes: Axes, layer: LayerHeads, matrix: np.ndarray, largest: float, theme: Theme) -> None:
    """One layer's; numbers in the cells where they fit."""
    axes.imshow(matrix, cmap="viridis", vmin=0, vmax=largest)
    _, chance, _ = layer.overlap() or (0, 0, 0)
    axes.set_title(f"{layer.name}, chance {chance:.2g}", loc="left", fontsize=8, color=theme.ink)
    axes.set_facecolor(theme.grid)
    heads = sorted(some(layer.heads, MAX_HEADS_NUMBERED))
    axes.set(xticks=heads, yticks=heads)
    axes.tick_params(colors=theme.faint, length=0, labelsize=7)
    axes.spines[:].set_visible(False)
    if layer.heads > MAX_HEADS_WRITTEN:
        return
    for (row, column), value in np.ndenumerate(matrix):
        if row != column:
            ink = LIGHT.ink if value > 0.6 * largest else LIGHT.paper
            axes.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=6, color=ink)
