import math
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch

from myriad.analysis.compare import Course, Curve, Result
from myriad.analysis.heads import LayerHeads
from myriad.analysis.plots import (
    expert_usage,
    head_overlap,
    learning_curve,
    loss_against_flops,
    loss_curves,
    router_entropy,
    weight_by_rank,
)
from myriad.analysis.plots.drawing import MAX_POINTS
from myriad.analysis.plots.learning import extremes
from myriad.analysis.plots.losses import running_mean
from myriad.analysis.routing import LayerUsage

CURVES = [
    Curve("PEER", [64 * step for step in range(1, 101)], [6 / step**0.5 for step in range(1, 101)], [3200], [1.7]),
    Curve("dense", [64], [6.0], [], []),
]


def size(png):
    """Width and height in pixels, from a PNG's first chunk."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", png[16:24])


def layer(counts, name="block 0"):
    counts = torch.tensor(counts)
    return LayerUsage(name, 10, counts, counts.double(), float(counts.sum()))


def test_a_figure_is_a_png_and_is_written_where_asked(tmp_path):
    png = loss_curves(CURVES, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes() == png
    width, height = size(png)
    assert width >= 900
    assert height < width


def test_looks_differ():
    looks = {loss_curves(CURVES, dark=dark, stacked=stacked) for dark in (False, True) for stacked in (False, True)}
    assert len(looks) == 4
    width, height = size(loss_curves(CURVES, stacked=True))
    assert height > width


ODD_CURVES = [
    Curve("empty", [], [], [], []),
    Curve("one", [64], [3.0], [64], [2.0]),
    Curve("broken", [64, 128], [math.nan, math.nan], [128], [math.nan]),
    Curve("gap", [64, 128, 192], [3.0, math.nan, 2.0], [64, 192], [2.0, math.nan]),
    Curve("infinite", [64, 128], [math.inf, 2.0], [], []),
    Curve("validated only", [], [], [64, 128], [2.0, 1.5]),
]


@pytest.mark.parametrize(
    "curves",
    [
        [],
        *([curve] for curve in ODD_CURVES),
        CURVES * 5,
    ],
)
def test_odd_curves_can_be_drawn(curves):
    size(loss_curves(curves))


@pytest.mark.parametrize("curve", [*CURVES, *ODD_CURVES])
def test_any_curve_of_one_run_can_be_drawn(curve, tmp_path):
    losses = [bits * math.log(2) for bits in curve.validation_bits]
    png = learning_curve(curve, losses, tmp_path / "curve.png")
    assert size(png)[0] >= 900
    assert (tmp_path / "curve.png").read_bytes() == png
    assert learning_curve(curve, losses, dark=True) != png


@pytest.mark.parametrize(("bits", "shown"), [([2.0, 1.0], True), ([2.0, 1.2], False), ([math.nan, 1.0], True)])
def test_bits_per_byte_are_a_second_scale_while_the_text_is_the_same(bits, shown, monkeypatch):
    labels = []
    monkeypatch.setattr("myriad.analysis.plots.learning.to_png", lambda figure, _: labels.extend(_axis_labels(figure)))
    learning_curve(Curve("run", [64, 128], [4.0, 2.0], [64, 128], bits), [3.0, 1.5])
    assert ("bits per byte" in labels) == shown


def _axis_labels(figure):
    (axes,) = figure.axes
    return [each.get_ylabel() for each in (axes, *axes.child_axes)]


def test_extremes_keep_what_would_be_seen():
    values = np.zeros(100_000)
    values[[7, 50_000, 99_999]] = 3.0, -2.0, 5.0
    values[60_000:70_000] = math.nan
    shown = extremes(values)
    assert len(shown) <= MAX_POINTS
    assert (np.diff(shown) > 0).all()
    assert {7, 50_000, 99_999} <= set(shown.tolist())
    assert np.isnan(values[shown]).any()
    assert extremes([3.0, 1.0, 2.0]).tolist() == [0, 1, 2]


def course(name="dense", parameters=1_700_000, budgets=("1e12flops",), deviation=0.01):
    validation = [([1e11 * step for step in range(1, 9)], [2 + 2 / step for step in range(1, 9)]) for _ in budgets]
    return Course(name, parameters, validation, [Result(budget, 2.2, deviation) for budget in budgets])


BUDGETS = ("1e12flops", "2e12flops")


@pytest.mark.parametrize(
    "courses",
    [
        [],
        [course()],
        [course("one", deviation=None), course("two", 8_000_000)],
        [course(f"contender-{index}", 10**6 * (index + 1), BUDGETS) for index in range(9)],
        [course("diverged", budgets=()), course()],
        [Course("unvalidated", 5, [([], [])], [Result("1e3flops", math.nan, None)])],
    ],
)
def test_losses_can_be_drawn_against_compute(courses, tmp_path):
    png = loss_against_flops(courses, tmp_path / "flops.png")
    assert size(png)[0] >= 900
    assert (tmp_path / "flops.png").read_bytes() == png


def test_several_budgets_are_named_and_contenders_told_apart(monkeypatch):
    figures = []
    monkeypatch.setattr("myriad.analysis.plots.compute.to_png", lambda figure, _: figures.append(figure))
    courses = [course(f"contender-{index}", 10**6 * (index + 1), BUDGETS) for index in range(8)]
    loss_against_flops(courses)
    training, held_out = figures[0].axes
    assert {text.get_text() for text in held_out.texts} == set(BUDGETS)
    assert len({line.get_color() for line in training.lines}) == len(courses)
    assert len(training.lines) == len(courses) * len(BUDGETS)
    assert [text.get_text() for text in training.get_legend().get_texts()] == [each.name for each in courses]


@pytest.mark.parametrize(
    "layers",
    [
        [],
        [layer([1, 0, 5, 2]), layer([1] * 9, "block 1")],
        [layer([0, 0, 0, 0])],
        [layer([3, index, 0], f"block {index}") for index in range(20)],
    ],
)
def test_usage_can_be_drawn(layers, tmp_path):
    png = expert_usage(layers, tmp_path / "usage.png")
    assert size(png)[0] >= 900
    assert (tmp_path / "usage.png").read_bytes() == png


def heads_of(heads, slots=2, name="block 0", entropy=0.5):
    matrix = torch.full((heads, heads), 0.25, dtype=torch.float64)
    sums = torch.full((heads,), entropy, dtype=torch.float64)
    weights = torch.full((slots,), 1 / slots, dtype=torch.float64)
    return LayerHeads(name, 9, sums, weights, matrix, matrix, matrix, torch.ones(heads))


ODD_HEADS = {
    "none": [],
    "one head": [heads_of(1)],
    "one expert for each head": [heads_of(3, slots=1)],
    "nothing shared": [replace(heads_of(2), shared=torch.zeros(2, 2))],
    "unequal": [heads_of(1), heads_of(4, slots=60), heads_of(9)],
    "never a weight": [heads_of(2, entropy=math.nan)],
    "many": [heads_of(2, name=f"block {index}") for index in range(30)],
}


@pytest.mark.parametrize("draw", [weight_by_rank, router_entropy, head_overlap])
@pytest.mark.parametrize("name", ODD_HEADS)
def test_heads_can_be_drawn(draw, name, tmp_path):
    png = draw(ODD_HEADS[name], tmp_path / "heads.png")
    assert size(png)[0] >= 900
    assert (tmp_path / "heads.png").read_bytes() == png


@pytest.mark.parametrize("draw", [weight_by_rank, router_entropy, head_overlap])
def test_looks_of_heads_differ(draw):
    looks = {draw([heads_of(2)] * 3, dark=dark, stacked=stacked) for dark in (False, True) for stacked in (False, True)}
    assert len(looks) == 4


def test_what_is_drawn_of_heads_is_what_they_did(monkeypatch):
    figures = []
    monkeypatch.setattr("myriad.analysis.plots.routing.to_png", lambda figure, _: figures.append(figure))
    layer = heads_of(2, slots=4)
    layer.shared[0, 1] = layer.shared[1, 0] = 3.0
    layer.entropy[1] = 1.5
    layer.weight_by_rank.copy_(torch.tensor([0.7, 0.2, 0.1, 0.0]))
    for draw in (weight_by_rank, router_entropy, head_overlap):
        draw([layer, heads_of(1)])
    weights, entropies, overlaps = (figure.axes for figure in figures)
    assert weights[0].lines[0].get_ydata().tolist() == layer.weight_by_rank.tolist()
    means, dots = entropies[0].lines[-2:]
    assert means.get_ydata().tolist() == [1.0, 0.5]
    assert dots.get_ydata().tolist() == [0.5, 1.5, 0.5]
    matrix, bar = overlaps  # of the one layer that has several heads, and the scale of colors
    assert np.isnan(matrix.images[0].get_array().filled(math.nan).diagonal()).all()
    assert [text.get_text() for text in matrix.texts] == ["3", "3"]
    assert bar.get_ylim() == (0, 3)


def test_the_running_mean_of_a_line_is_the_line():
    values = np.linspace(5, 1, 800)
    assert np.allclose(running_mean(values)[20:-20], values[20:-20])


def test_the_running_mean_does_not_flatten_a_steep_start():
    values = 10 / np.arange(1, 2001) ** 0.5
    smooth = running_mean(values)
    assert smooth[0] == 10
    assert (np.abs(smooth / values - 1) < 0.15).all()


def test_the_running_mean_leaves_out_what_is_not_finite():
    values = np.full(400, 2.0)
    values[[50, 51, 300]] = math.nan, math.inf, -math.inf
    assert np.allclose(running_mean(values), 2.0)
    assert np.isnan(running_mean([math.nan, 1.0])).tolist() == [True, False]
    assert len(running_mean([])) == 0
