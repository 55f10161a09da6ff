"""What all figures share: themes, axes, limits, and how a figure becomes a PNG."""

import io
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

DPI = 160
MAX_LEGEND = 8
MAX_MARKERS = 40
MAX_POINTS = 2000
STEEP_FALL = 1.25
"""A steep fall at the start is cut off if with it a panel would have to be so much higher."""


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


def look_of(theme: Theme, index: int) -> dict[str, Any]:
    """How a run is drawn. A dashed line lets the run show on which it lies."""
    color, marker = theme.runs[index % len(theme.runs)], MARKERS[index % len(MARKERS)]
    dashes = ("-", (0, (3, 1.2)))[index % 2]
    return {"color": color, "linestyle": dashes, "marker": marker, "markersize": 4.5, "linewidth": 1.8}


def limit(axes: Axes, values: np.ndarray, tails: np.ndarray, theme: Theme) -> None:
    """Where a steep fall at the start would flatten the rest, let the axis begin below it, and say so."""
    values, tails = values[np.isfinite(values)], tails[np.isfinite(tails)]
    if len(tails) and values.max() - tails.min() > STEEP_FALL * np.ptp(tails):
        room = 0.04 * (np.ptp(tails) or 1)
        axes.set_ylim(tails.min() - room, tails.max() + room)
        note = f"{axes.get_xlabel()} (not shown: the fall from {values.max():.3g})"
        axes.set_xlabel(note, color=theme.faint)


def colors_of_depth(theme: Theme, layers: int) -> np.ndarray:
    """One for each layer, shallow to deep."""
    return matplotlib.colormaps["viridis"](np.linspace(*theme.depths, max(layers, 2)))


def some(number: int, at_most: int) -> set[int]:
    """Evenly spaced indices, the first and the last among them; all, where there are few."""
    return {round(index) for index in np.linspace(0, number - 1, min(number, at_most))}


def new_figure(theme: Theme, stacked: bool, panels: int) -> Figure:
    size = (4.4, 0.4 + 2.9 * panels) if stacked else (9.0, 3.7)
    return Figure(figsize=size, dpi=DPI, layout="constrained", facecolor=theme.paper)


def style(axes: Axes, theme: Theme, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=theme.ink, fontweight="bold")
    axes.set_xlabel(x_label, color=theme.faint)
    axes.set_ylabel(y_label, color=theme.faint)
    axes.set_facecolor(theme.paper)
    axes.grid(True, color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=theme.faint, length=0)
    axes.spines[:].set_visible(False)
    axes.yaxis.set_major_locator(MaxNLocator(6))


def finish(axes: Axes, theme: Theme, if_empty: str) -> None:
    """The legend, or a word in place of an empty panel."""
    if any(len(np.atleast_1d(line.get_xdata())) for line in axes.lines):
        axes.legend(frameon=False, labelcolor=theme.ink, fontsize=9)
    else:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, if_empty, ha="center", va="center", transform=axes.transAxes, color=theme.faint)


def to_png(figure: Figure, path: str | Path | None) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=figure.get_facecolor())
    if path is not None:
        Path(path).write_bytes(buffer.getvalue())
    return buffer.getvalue()
