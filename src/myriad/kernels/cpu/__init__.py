"""The ops in Numba: fused loops over rows, on all cores."""

import torch

from myriad.kernels.cpu import cross_entropy, expert_lookup, product_key, retrieved_lookup, table_update, value_lookup
from myriad.kernels.registry import register

DTYPES = (torch.float32, torch.bfloat16)

register("product_key", "numba", product_key.FUNCTIONS, devices=("cpu",), dtypes=DTYPES)
register("expert_lookup", "numba", expert_lookup.FUNCTIONS, devices=("cpu",), dtypes=DTYPES)
register("value_lookup", "numba", value_lookup.FUNCTIONS, devices=("cpu",), dtypes=DTYPES)
register("retrieved_lookup", "numba", retrieved_lookup.FUNCTIONS, devices=("cpu",), dtypes=DTYPES)
register("cross_entropy", "numba", cross_entropy.FUNCTIONS, devices=("cpu",), dtypes=DTYPES)
register("table_update", "numba", table_update.FUNCTIONS, devices=("cpu",), dtypes=DTYPES)
