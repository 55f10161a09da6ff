"""Feed-forward layers: one file per family, each a config and the layer that it builds."""

from myriad.ffn.base import FFN, Cost, FFNConfig, FFNOutput, Role, Routing
from myriad.ffn.dense import DenseConfig
from myriad.ffn.expert_choice import ExpertChoiceConfig
from myriad.ffn.peer import PEERConfig
from myriad.ffn.product_key_memory import ProductKeyMemoryConfig
from myriad.ffn.stack import StackConfig
from myriad.ffn.tables import TableConfig
from myriad.ffn.token_choice import TokenChoiceConfig


def kinds() -> list[str]:
    """The kinds of feed-forward layers that a config can name."""
    return sorted(FFNConfig.kinds)


__all__ = [
    "FFN",
    "Cost",
    "DenseConfig",
    "ExpertChoiceConfig",
    "FFNConfig",
    "FFNOutput",
    "PEERConfig",
    "ProductKeyMemoryConfig",
    "Role",
    "Routing",
    "StackConfig",
    "TableConfig",
    "TokenChoiceConfig",
    "kinds",
]
