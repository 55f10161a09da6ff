"""The course of one run, as it is drawn beside it."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator

from myriad.analysis.compare import Curve
from myriad.analysis.plots.drawing import (
    DARK,
    LIGHT,
    MAX_MARKERS,
    MAX_POINTS,
    Theme,
    finish,
    limit,
    new_figure,
    style,
    to_png,
)
from myriad.analysis.plots.losses import STEEP_SHARE, running_mean

SAME_TEXT = 1e-3
"""Ratios of bits per byte to nats per token that differ by less than this share are of the same text."""


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
    figure = new_figure(theme, stacked=False, panels=1)
    axes = figure.subplots()
    style(axes, theme, curve.name, "training tokens", "nats per token")
    _draw_noise(axes, curve, theme.runs[0])
    _draw_validation(axes, curve.validation_tokens, validation_loss, theme)
    _limit_both(axes, curve, validation_loss, theme)
    _add_bits(axes, curve.validation_bits, validation_loss, theme)
    axes.set_title(_best(curve, validation_loss), loc="right", fontsize=9, color=theme.faint)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(0, 1.01 * max([*curve.train_tokens[-1:], *curve.validation_tokens[-1:]], default=1))
    finish(axes, theme, "nothing recorded")
    return to_png(figure, path)


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
    limit(axes, losses, losses[tokens > STEEP_SHARE * tokens.max(initial=0)], theme)


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
