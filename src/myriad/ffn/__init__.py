"""Feed-forward layers: one file per family, each a config and the layer that it builds."""

from myriad.ffn.base import FFN, Cost, FFNConfig, FFNOutput, Role, Routing
from myriad.ffn.dense import DenseConfig
from myriad.ffn.peer import PEERConfig
from myriad.ffn.stack import StackConfig


def kinds() -> list[str]:
    """The kinds of feed-forward layers that a config can name."""
    return sorted(FFNConfig.kinds)


__all__ = [
    "FFN",
    "Cost",
    "DenseConfig",
    "FFNConfig",
    "FFNOutput",
    "PEERConfig",
    "Role",
    "Routing",
    "StackConfig",
    "kinds",
]
