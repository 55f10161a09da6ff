"""Rotary positions (arXiv 2104.09864), computed anew in each forward: the model keeps no buffers for them."""

import torch
from torch import Tensor


def rotary_angles(positions_BS: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of shape (B, 1, S, width / 2), float32, to be shared by all layers and heads."""
    exponents = torch.arange(0, width, 2, device=positions_BS.device, dtype=torch.float32) / width
    angles = positions_BS[:, None, :, None].float() * theta**-exponents
    return angles.cos(), angles.sin()


def rotate(x_BHSQ: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (x[i], x[i + Q/2]) of every head by its position's angles."""
    cos, sin = (part.to(x_BHSQ.dtype) for part in angles)
    first, second = x_BHSQ.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
