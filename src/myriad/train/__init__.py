"""Training: a frozen config in, a run folder out."""

from myriad.train.optim import build_optimizer
from myriad.train.run import RunConfig, with_overrides
from myriad.train.session import fit

__all__ = ["RunConfig", "build_optimizer", "fit", "with_overrides"]
