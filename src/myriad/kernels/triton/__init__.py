"""The ops in Triton, for CUDA: importing this package registers them.

Products of rows are taken row by row, as wide coalesced loads whose sums are float32; tables are read in their own
dtype, never cast and never copied. No kernel adds with atomics: the same input gives the same bits.

- `bags.py`: the dot products of looked-up rows with a token, and their weighted sum.
- `segments.py`: gradients of tables: entries sorted by row, one segment a row.
- `rounding.py`: stochastic rounding.
- `expert_lookup.py`, `value_lookup.py`, `product_key.py`, `table_update.py`, `rounded_adamw.py`, `cross_entropy.py`,
  `batch_norm.py`: the ops.

Under Triton's interpreter, which runs kernels on the CPU for tests, tensors of the CPU are taken as well.
"""

from typing import Any

import torch
from triton import knobs

from myriad.kernels.registry import register
from myriad.kernels.triton import (
    batch_norm,
    cross_entropy,
    expert_lookup,
    product_key,
    rounded_adamw,
    table_update,
    value_lookup,
)


def _register(op: str, functions: Any) -> None:
    devices = ("cuda", "cpu") if knobs.runtime.interpret else ("cuda",)
    register(op, "triton", functions, devices=devices, dtypes=(torch.float32, torch.bfloat16))


_register("product_key", product_key.FUNCTIONS)
_register("expert_lookup", expert_lookup.FUNCTIONS)
_register("value_lookup", value_lookup.FUNCTIONS)
_register("table_update", table_update.FUNCTIONS)
_register("rounded_adamw", rounded_adamw.FUNCTIONS)
_register("cross_entropy", cross_entropy.FUNCTIONS)
_register("batch_norm", batch_norm.FUNCTIONS)
