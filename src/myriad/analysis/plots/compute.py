"""Bits per byte against compute and size: what a comparison shows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from myriad.analysis.compare import Course
from myriad.analysis.plots.drawing import DARK, LIGHT, Theme, finish, limit, look_of, new_figure, style, to_png


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
    figure = new_figure(theme, stacked, panels=2)
    training, held_out = figure.subplots(*((2, 1) if stacked else (1, 2)))
    style(training, theme, "While training: validation", "training FLOPs", "bits per byte")
    style(held_out, theme, "At the end: held-out text", "parameters", "bits per byte")
    for index, course in enumerate(courses):
        look = look_of(theme, index)
        for place, (flops, bits) in enumerate(course.validation):
            training.plot(flops, bits, label=None if place else course.name, **look)
        _draw_results(held_out, course, look)
    _join_budgets(held_out, courses, theme)
    _limit_courses(training, courses, theme)
    several = max((len(each.validation) for each in courses), default=0) > 1
    if several:
        _in_decades(training)
    else:
        # Not from the first validation on: runs that have one alone end within a percent of each other.
        spent = [flops[-1] for course in courses for flops, _ in course.validation if flops]
        training.set_xlim(0, 1.05 * max(spent, default=1))
        training.xaxis.set_major_locator(MaxNLocator(6))
    training.xaxis.set_major_formatter(EngFormatter(sep=""))
    held_out.margins(x=0.35 if several else 0.1)  # room for the names of the budgets
    finish(training, theme, "nothing recorded")
    if not (training.lines and held_out.lines):  # one legend is enough for both
        finish(held_out, theme, "nothing measured")
    return to_png(figure, path)


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
    limit(axes, np.concatenate([[], *bits]), np.concatenate([[], *(values[1:] or values for values in bits)]), theme)
