"""Honest figures: perplexity with every target counted once, and a check that the model cannot cheat."""

from myriad.evaluate.causality import batch_leak, check_causality, future_leak
from myriad.evaluate.perplexity import Perplexity, evaluate, windows
from myriad.evaluate.views import View, causal_view, training_view

__all__ = [
    "Perplexity",
    "View",
    "batch_leak",
    "causal_view",
    "check_causality",
    "evaluate",
    "future_leak",
    "training_view",
    "windows",
]
