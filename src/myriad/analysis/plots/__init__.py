"""Figures as PNG: losses against tokens and against compute, and how a model uses and weights its experts.

The only importer of matplotlib, through its object-oriented interface: no window, no global figure. Every figure
comes in a light and a dark look, and with its panels side by side or stacked for narrow screens.
"""

from myriad.analysis.plots.compute import loss_against_flops
from myriad.analysis.plots.learning import learning_curve
from myriad.analysis.plots.losses import loss_curves
from myriad.analysis.plots.routing import expert_usage, head_overlap, router_entropy, weight_by_rank

__all__ = [
    "expert_usage",
    "head_overlap",
    "learning_curve",
    "loss_against_flops",
    "loss_curves",
    "router_entropy",
    "weight_by_rank",
]
