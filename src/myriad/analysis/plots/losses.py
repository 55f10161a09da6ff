"""Losses of runs against tokens."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from myriad.analysis.compare import Curve
from myriad.analysis.plots.drawing import DARK, LIGHT, Theme, finish, limit, look_of, new_figure, style, to_png

STEEP_SHARE = 0.04
"""The first part of a run, in which the training loss may fall steeply."""


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
    figure = new_figure(theme, stacked, panels=2)
    training, validation = figure.subplots(*((2, 1) if stacked else (1, 2)))
    style(training, theme, "Training loss", "training tokens", "nats per token")
    style(validation, theme, "Validation", "training tokens", "bits per byte")
    for index, curve in enumerate(curves):
        look = look_of(theme, index)
        _draw_training(training, curve, look)
        validation.plot(curve.validation_tokens, curve.validation_bits, label=curve.name, **look)
    _limit_training(training, curves, theme)
    for axes in (training, validation):
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlim(left=0)
        finish(axes, theme, "nothing recorded")
    return to_png(figure, path)


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
    limit(axes, values, np.concatenate([[], *(_without_start(curve.train_loss) for curve in curves)]), theme)


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
