"""Figures as PNG: losses against tokens and against compute, and how a model uses and weights its experts.

The only importer of matplotlib, through its object-oriented interface: no window, no global figure. Every figure
comes in a light and a dark look, and with its panels side by side or stacked for narrow screens.
"""

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from myriad.analysis.compare import Course, Curve
from myriad.analysis.heads import LayerHeads
from myriad.analysis.routing import LayerUsage

DPI = 160
MAX_LEGEND = 8
MAX_POINTS = 2000
MAX_MARKERS = 40
MAX_MATRICES = 8
MAX_HEADS_NUMBERED = 8
MAX_HEADS_WRITTEN = 4
"""The cells of a matrix of more heads are too small for numbers."""
SAME_TEXT = 1e-3
"""Ratios of bits per byte to nats per token that differ by less than this share are of the same text."""
STEEP_SHARE = 0.04
"""The first part of a run, in which the training loss may fall steeply."""
STEEP_FALL = 1.25
"""That fall is cut off if with it the training panel would have to be so much higher."""


class Theme(NamedTuple):
    """The colors of a figure; those of the runs are told apart by color-blind readers too."""

    ink: str
    faint: str
    grid: str
    paper: str
    runs: tuple[str, ...]
    depths: tuple[float, float]
    """The part of the color map that layers, shallow to deep, are drawn in."""


MARKERS = "os^DvPX*"
LIGHT_RUNS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#8c6d00", "#3d9bd1", "#5a3fa0", "#6b7280")
DARK_RUNS = ("#56b4e9", "#f0934e", "#3ccf9f", "#d99ac5", "#e3c94f", "#9fd8f5", "#a99af0", "#aab2bd")
LIGHT = Theme("#1f2933", "#616e7c", "#e4e7eb", "#ffffff", LIGHT_RUNS, (0.0, 0.82))
DARK = Theme("#e4e7eb", "#9aa5b1", "#323f4b", "#171c22", DARK_RUNS, (0.3, 1.0))


def loss_curves(
    curves: Sequence[Curve], path: str | Path | None = None, *, dark: bool = False, stacked: bool = False
) -> bytes:
    """Training loss and validation bits per byte against training tokens, one color for each run.

    Args:
        curves: the runs.
        path: where to write the figure too.
        dark: for a dark page.
        stacked: one panel above the other, for narrow screens.

    Returns:
        A PNG.
    """
    theme = DARK if dark else LIGHT
    figure = _new_figure(theme, stacked, panels=2)
    training, validation = figure.subplots(*((2, 1) if stacked else (1, 2)))
    _style(training, theme, "Training loss", "training tokens", "nats per token")
    _style(validation, theme, "Validation", "training tokens", "bits per byte")
    for index, curve in enumerate(curves):
        look = _look(theme, index)
        _draw_training(training, curve, look)
        validation.plot(curve.validation_tokens, curve.validation_bits, label=curve.name, **look)
    _limit_training(training, curves, theme)
    for axes in (training, validation):
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlim(left=0)
        _finish(axes, theme, "nothing recorded")
    return _to_png(figure, path)


def loss_against_flops(
    courses: Sequence[Course], path: str | Path | None = None, *, dark: bool = False, stacked: bool = False
) -> bytes:
    """Bits per byte against compute: validation while training, and held-out text at the end by size of the model.

    In the second panel a line joins the contenders of one budget (isoFLOP curves where budgets are FLOPs); bars are
    standard deviations over seeds.

    Args:
        courses: the contenders, in the order of their colors.
        path: where to write the figure too.
        dark: for a dark page.
        stacked: one panel above the other, for narrow screens.

    Returns:
        A PNG.
    """
    theme = DARK if dark else LIGHT
    figure = _new_figure(theme, stacked, panels=2)
    training, held_out = figure.subplots(*((2, 1) if stacked else (1, 2)))
    _style(training, theme, "While training: validation", "training FLOPs", "bits per byte")
    _style(held_out, theme, "At the end: held-out text", "parameters", "bits per byte")
    for index, course in enumerate(courses):
        look = _look(theme, index)
        for place, (flops, bits) in enumerate(course.validation):
            training.plot(flops, bits, label=None if place else course.name, **look)
        _draw_results(held_out, course, look)
    _join_budgets(held_out, courses, theme)
    _limit_courses(training, courses, theme)
    several = max((len(each.validation) for each in courses), default=0) > 1
    if several:
        _in_decades(training)
    training.xaxis.set_major_formatter(EngFormatter(sep=""))
    held_out.margins(x=0.35 if several else 0.1)  # room for the names of the budgets
    _finish(training, theme, "nothing recorded")
    if not (training.lines and held_out.lines):  # one legend is enough for both
        _finish(held_out, theme, "nothing measured")
    return _to_png(figure, path)


def _draw_results(axes: Axes, course: Course, look: Mapping[str, Any]) -> None:
    """A mark for each budget, with a bar of two standard deviations in all."""
    for place, result in enumerate(course.results):
        label = None if place else course.name
        style = {"color": look["color"], "marker": look["marker"], "markersize": 6, "capsize": 3, "zorder": 3}
        axes.errorbar(course.parameters, result.bits, result.deviation or None, linestyle="", label=label, **style)


def _join_budgets(axes: Axes, courses: Sequence[Course], theme: Theme) -> None:
    """A line from the smallest model to the largest for each budget, which it names where there are several."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for course in courses:
        for result in course.results:
            lines.setdefault(result.budget, []).append((course.parameters, result.bits))
    for budget, points in lines.items():
        sizes, bits = zip(*sorted(points), strict=True)
        axes.plot(sizes, bits, color=theme.faint, linewidth=0.9, linestyle=":", zorder=1)
        if len(lines) > 1:
            place = {"xytext": (-8, 0), "textcoords": "offset points", "ha": "right", "va": "center"}
            axes.annotate(budget, (sizes[0], bits[0]), color=theme.faint, fontsize=8, **place)
    if lines:
        _in_decades(axes)


def _in_decades(axes: Axes) -> None:
    """A logarithmic axis of counts, with three numbers a decade."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _limit_courses(axes: Axes, courses: Sequence[Course], theme: Theme) -> None:
    bits = [values for course in courses for _, values in course.validation]
    _limit(axes, np.concatenate([[], *bits]), np.concatenate([[], *(values[1:] or values for values in bits)]), theme)


def _look(theme: Theme, index: int) -> dict[str, Any]:
    """How a run is drawn. A dashed line lets the run show on which it lies."""
    color, marker = theme.runs[index % len(theme.runs)], MARKERS[index % len(MARKERS)]
    dashes = ("-", (0, (3, 1.2)))[index % 2]
    return {"color": color, "linestyle": dashes, "marker": marker, "markersize": 4.5, "linewidth": 1.8}


def _draw_training(axes: Axes, curve: Curve, look: dict[str, Any]) -> None:
    """The running mean over the raw losses, which stay visible behind it."""
    if not curve.train_tokens:
        return
    axes.plot(curve.train_tokens, curve.train_loss, color=look["color"], alpha=0.22, linewidth=0.8, zorder=1.5)
    marker = look["marker"] if len(curve.train_tokens) == 1 else ""
    smooth = running_mean(curve.train_loss)
    axes.plot(curve.train_tokens, smooth, label=curve.name, **{**look, "marker": marker})


def _limit_training(axes: Axes, curves: Sequence[Curve], theme: Theme) -> None:
    values = np.concatenate([[], *(curve.train_loss for curve in curves)])
    _limit(axes, values, np.concatenate([[], *(_without_start(curve.train_loss) for curve in curves)]), theme)


def _limit(axes: Axes, values: np.ndarray, tails: np.ndarray, theme: Theme) -> None:
    """Where a steep fall at the start would flatten the rest, let the axis begin below it, and say so."""
    values, tails = values[np.isfinite(values)], tails[np.isfinite(tails)]
    if len(tails) and values.max() - tails.min() > STEEP_FALL * np.ptp(tails):
        room = 0.04 * (np.ptp(tails) or 1)
        axes.set_ylim(tails.min() - room, tails.max() + room)
        note = f"{axes.get_xlabel()} (not shown: the fall from {values.max():.3g})"
        axes.set_xlabel(note, color=theme.faint)


def _without_start(losses: list[float]) -> list[float]:
    return losses[math.ceil(STEEP_SHARE * len(losses)) :]


def running_mean(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """The mean over a centered window of about a twentieth of the values, those that are not finite left out.

    NaN where the whole window has none. At the start, where losses fall fast, it is narrower; at the end it is cut
    off: no value is shifted.
    """
    raw = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(raw)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, raw, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    places = np.arange(len(raw))
    half = np.minimum(places // 2, len(raw) // 40)
    first, last = places - half, np.minimum(places + half + 1, len(raw))
    number = counts[last] - counts[first]
    return np.where(number > 0, (sums[last] - sums[first]) / np.maximum(number, 1), np.nan)


def learning_curve(
    curve: Curve, validation_loss: Sequence[float], path: str | Path | None = None, *, dark: bool = False
) -> bytes:
    """Training and validation loss of one run against training tokens, and what they are in bits per byte.

    The second scale is that of the validation split; it is left out where its tokens per byte changed.

    Args:
        curve: the run.
        validation_loss: in nats per token, one for each validation of the curve.
        path: where to write the figure too.
        dark: for a dark page.

    Returns:
        A PNG.
    """
    theme = DARK if dark else LIGHT
    figure = _new_figure(theme, stacked=False, panels=1)
    axes = figure.subplots()
    _style(axes, theme, curve.name, "training tokens", "nats per token")
    _draw_noise(axes, curve, theme.runs[0])
    _draw_validation(axes, curve.validation_tokens, validation_loss, theme)
    _limit_both(axes, curve, validation_loss, theme)
    _add_bits(axes, curve.validation_bits, validation_loss, theme)
    axes.set_title(_best(curve, validation_loss), loc="right", fontsize=9, color=theme.faint)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(0, 1.01 * max([*curve.train_tokens[-1:], *curve.validation_tokens[-1:]], default=1))
    _finish(axes, theme, "nothing recorded")
    return _to_png(figure, path)


def _draw_noise(axes: Axes, curve: Curve, color: str) -> None:
    """The training loss, thin, behind its running mean."""
    if not curve.train_tokens:
        return
    tokens, loss = np.asarray(curve.train_tokens), np.asarray(curve.train_loss)
    shown = extremes(loss)
    axes.plot(tokens[shown], loss[shown], color=color, alpha=0.25, linewidth=0.6, zorder=1.5)
    marker = "o" if len(tokens) == 1 else ""
    smooth = running_mean(loss)
    shown = extremes(smooth)
    axes.plot(tokens[shown], smooth[shown], color=color, linewidth=2, marker=marker, label="training, running mean")


def _draw_validation(axes: Axes, tokens: Sequence[int], losses: Sequence[float], theme: Theme) -> None:
    if not tokens:
        return
    marker = "o" if len(tokens) <= MAX_MARKERS else ""
    look = {"marker": marker, "markersize": 4.5, "markeredgecolor": theme.paper, "markeredgewidth": 0.8}
    axes.plot(tokens, losses, color=theme.runs[1], linewidth=1.4, label="validation", **look, zorder=3)


def _limit_both(axes: Axes, curve: Curve, validation_loss: Sequence[float], theme: Theme) -> None:
    tokens = np.array([*curve.train_tokens, *curve.validation_tokens], dtype=np.float64)
    losses = np.array([*curve.train_loss, *validation_loss], dtype=np.float64)
    _limit(axes, losses, losses[tokens > STEEP_SHARE * tokens.max(initial=0)], theme)


def _add_bits(axes: Axes, bits: Sequence[float], losses: Sequence[float], theme: Theme) -> None:
    """A second scale at the right, in bits per byte."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.asarray(bits, dtype=np.float64) / np.asarray(losses, dtype=np.float64)
    ratios = ratios[np.isfinite(ratios) & (ratios > 0)]
    if not len(ratios) or np.ptp(ratios) > SAME_TEXT * ratios.max():
        return
    ratio = float(ratios[-1])
    right = axes.secondary_yaxis("right", functions=(lambda x: np.multiply(x, ratio), lambda x: np.divide(x, ratio)))
    right.set_ylabel("bits per byte", color=theme.faint)
    right.tick_params(colors=theme.faint, length=0)
    right.spines[:].set_visible(False)
    right.yaxis.set_major_locator(MaxNLocator(6))


def _best(curve: Curve, validation_loss: Sequence[float]) -> str:
    """The lowest validation loss, in words; nothing where there is none."""
    rows = zip(validation_loss, curve.validation_bits, curve.validation_tokens, strict=True)
    best = min((row for row in rows if math.isfinite(row[0])), default=None)
    if best is None:
        return ""
    loss, bits, tokens = best
    in_bits = f" ({bits:.3f} bits per byte)" if math.isfinite(bits) else ""
    at = EngFormatter(sep="", places=1 if tokens >= 1000 else 0)(tokens)
    return f"best validation {loss:.3f}{in_bits} at {at} tokens"


def extremes(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Which of many values to draw, so that a noisy line looks as it would with all of them.

    Of each stretch the lowest and the highest; all, where there are no more than a figure can show.

    Returns:
        Ascending indices.
    """
    raw = np.asarray(values, dtype=np.float64)
    if len(raw) <= MAX_POINTS:
        return np.arange(len(raw))
    finite = np.isfinite(raw)
    lows, highs = np.where(finite, raw, np.inf), np.where(finite, raw, -np.inf)
    edges = np.linspace(0, len(raw), MAX_POINTS // 2 + 1).astype(np.int64)
    spans = [slice(first, last) for first, last in itertools.pairwise(edges)]
    return np.unique([span.start + part[span].argmin() for span in spans for part in (lows, -highs)])


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
    figure = _new_figure(theme, stacked, panels=1)
    axes = figure.subplots()
    _style(axes, theme, "Usage of experts", "rank of the expert, as a share of all experts", "draws / uniform share")
    colors = _colors_of_depth(theme, len(layers))
    named = _some(len(layers), MAX_LEGEND)
    for index, layer in enumerate(layers):
        label = layer.name if index in named else None
        axes.plot(*_sorted_usage(layer.counts.numpy()), color=colors[index], linewidth=1.6, label=label)
    if layers:
        axes.set(xscale="log", yscale="log")
        axes.axhline(1, color=theme.faint, linewidth=1, linestyle="--", label="uniform")
        chance = _chance_counts(layers[0])
        axes.plot(*_sorted_usage(chance), color=theme.faint, linewidth=1.2, linestyle=":", label="uniform draws")
    _finish(axes, theme, "no routed layer")
    return _to_png(figure, path)


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
    figure = _new_figure(theme, stacked, panels=1)
    axes = figure.subplots()
    _style(axes, theme, "Router weights", "rank of the expert among a head's", "share of the head's weight")
    colors, named = _colors_of_depth(theme, len(layers)), _some(len(layers), MAX_LEGEND)
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
    axes.set_xticks([rank + 1 for rank in sorted(_some(most, 16))])
    axes.set_ylim(bottom=0)
    _finish(axes, theme, "no routed layer")
    return _to_png(figure, path)


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
    figure = _new_figure(theme, stacked, panels=1)
    axes = figure.subplots()
    _style(axes, theme, "Entropy of router weights", "", "nats")
    if layers:
        _draw_entropies(axes, layers, theme)
        shown = sorted(_some(len(layers), 4 if stacked else 12))
        axes.set_xticks(shown, [layers[index].name for index in shown])
        axes.set_ylim(0, 1.12 * max(0.1, *(layer.largest_entropy for layer in layers)))
    _finish(axes, theme, "no routed layer")
    return _to_png(figure, path)


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
    figure = _new_figure(theme, stacked, panels=1)
    figure.suptitle("Overlap of heads", x=0.01, ha="left", fontsize=11, color=theme.ink, fontweight="bold")
    several = [layer for layer in layers if layer.heads > 1]
    shown = [several[index] for index in sorted(_some(len(several), MAX_MATRICES))]
    if shown:
        _draw_matrices(figure, shown, theme, columns=min(2 if stacked else 4, len(shown)))
    else:
        axes = figure.subplots()
        _style(axes, theme, "", "", "")
        _finish(axes, theme, "no layer with several heads")
    return _to_png(figure, path)


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
    heads = sorted(_some(layer.heads, MAX_HEADS_NUMBERED))
    axes.set(xticks=heads, yticks=heads)
    axes.tick_params(colors=theme.faint, length=0, labelsize=7)
    axes.spines[:].set_visible(False)
    if layer.heads > MAX_HEADS_WRITTEN:
        return
    for (row, column), value in np.ndenumerate(matrix):
        if row != column:
            ink = LIGHT.ink if value > 0.6 * largest else LIGHT.paper
            axes.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=6, color=ink)


def _colors_of_depth(theme: Theme, layers: int) -> np.ndarray:
    """One for each layer, shallow to deep."""
    return matplotlib.colormaps["viridis"](np.linspace(*theme.depths, max(layers, 2)))


def _some(number: int, at_most: int) -> set[int]:
    """Evenly spaced indices, the first and the last among them; all, where there are few."""
    return {round(index) for index in np.linspace(0, number - 1, min(number, at_most))}


def _new_figure(theme: Theme, stacked: bool, panels: int) -> Figure:
    size = (4.4, 0.4 + 2.9 * panels) if stacked else (9.0, 3.7)
    return Figure(figsize=size, dpi=DPI, layout="constrained", facecolor=theme.paper)


def _style(axes: Axes, theme: Theme, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=theme.ink, fontweight="bold")
    axes.set_xlabel(x_label, color=theme.faint)
    axes.set_ylabel(y_label, color=theme.faint)
    axes.set_facecolor(theme.paper)
    axes.grid(True, color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=theme.faint, length=0)
    axes.spines[:].set_visible(False)
    axes.yaxis.set_major_locator(MaxNLocator(6))


def _finish(axes: Axes, theme: Theme, if_empty: str) -> None:
    """The legend, or a word in place of an empty panel."""
    if any(len(np.atleast_1d(line.get_xdata())) for line in axes.lines):
        axes.legend(frameon=False, labelcolor=theme.ink, fontsize=9)
    else:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, if_empty, ha="center", va="center", transform=axes.transAxes, color=theme.faint)


def _to_png(figure: Figure, path: str | Path | None) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=figure.get_facecolor())
    if path is not None:
        Path(path).write_bytes(buffer.getvalue())
    return buffer.getvalue()
