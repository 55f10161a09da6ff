"""Honest figures: perplexity with every target counted once, and a check that the model cannot cheat."""

from myriad.evaluate.causality import batch_leak, check_causality, future_leak
from myriad.evaluate.perplexity import Perplexity, evaluate, windows

__all__ = ["Perplexity", "batch_leak", "check_causality", "evaluate", "future_leak", "windows"]
