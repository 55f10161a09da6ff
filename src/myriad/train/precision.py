"""Where products are made in bfloat16."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from myriad.kernels.hardware import multiplies_bfloat16_fast

Precision = Literal["float32", "bfloat16"]


def resolve_precision(asked: Literal["auto", "float32", "bfloat16"], device: torch.device) -> Precision:
    """`auto` is bfloat16 where the hardware multiplies it fast."""
    if asked != "auto":
        return asked
    return "bfloat16" if multiplies_bfloat16_fast(device.type) else "float32"


def autocast(
    precision: Precision, device: torch.device, weights: Precision = "float32"
) -> AbstractContextManager[object]:
    """The context in which a forward pass runs; with weights of bfloat16, products are in it of themselves."""
    casts = precision == "bfloat16" and weights == "float32"
    return torch.autocast(device.type, torch.bfloat16) if casts else nullcontext()
