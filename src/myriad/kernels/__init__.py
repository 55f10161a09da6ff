"""Arithmetic with several implementations: `use("reference")` chooses, `auto` is the default."""

from myriad.kernels.batch_norm import batch_norm
from myriad.kernels.cross_entropy import cross_entropy, softmax_gradient
from myriad.kernels.expert_lookup import expert_lookup
from myriad.kernels.product_key import product_key
from myriad.kernels.registry import choices, current, names, select, use
from myriad.kernels.retrieved_lookup import retrieve, retrieved_lookup
from myriad.kernels.rounded_adamw import rounded_adamw
from myriad.kernels.table_update import lazy_adam, new_moments
from myriad.kernels.value_lookup import value_lookup

__all__ = [
    "batch_norm",
    "choices",
    "cross_entropy",
    "current",
    "expert_lookup",
    "lazy_adam",
    "names",
    "new_moments",
    "product_key",
    "retrieve",
    "retrieved_lookup",
    "rounded_adamw",
    "select",
    "softmax_gradient",
    "use",
    "value_lookup",
]
