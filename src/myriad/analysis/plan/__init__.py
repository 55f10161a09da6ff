"""What training a model takes, before it is tried: memory, FLOPs and time."""

from myriad.analysis.plan.dry_run import DryStep, dry_step
from myriad.analysis.plan.layouts import Layout, Memory, Numbers, layouts, memory_of
from myriad.analysis.plan.report import Line, Machine, Plan, make_plan

__all__ = [
    "DryStep",
    "Layout",
    "Line",
    "Machine",
    "Memory",
    "Numbers",
    "Plan",
    "dry_step",
    "layouts",
    "make_plan",
    "memory_of",
]
