"""Myriad: language models whose feed-forward layers are mixtures of experts, from eight transformers to a
million single neurons.

The public names are imported when they are first used, so that `import myriad` loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "build": "myriad.models",
    "load": "myriad.checkpoint",
    "LanguageModel": "myriad.models",
    "ModelConfig": "myriad.models",
    "TransformerConfig": "myriad.models",
    "FFNConfig": "myriad.ffn",
    "DenseConfig": "myriad.ffn",
    "PEERConfig": "myriad.ffn",
    "ProductKeyMemoryConfig": "myriad.ffn",
    "StackConfig": "myriad.ffn",
    "TableConfig": "myriad.ffn",
    "RunConfig": "myriad.train",
    "register": "myriad.config",
    "MyriadError": "myriad.config",
}
_ROOMS = (
    "analysis",
    "checkpoint",
    "config",
    "data",
    "evaluate",
    "ffn",
    "hf",
    "kernels",
    "models",
    "presets",
    "train",
)

if TYPE_CHECKING:
    from myriad.checkpoint import load as load
    from myriad.config import MyriadError as MyriadError
    from myriad.config import register as register
    from myriad.ffn import DenseConfig as DenseConfig
    from myriad.ffn import FFNConfig as FFNConfig
    from myriad.ffn import PEERConfig as PEERConfig
    from myriad.ffn import ProductKeyMemoryConfig as ProductKeyMemoryConfig
    from myriad.ffn import StackConfig as StackConfig
    from myriad.ffn import TableConfig as TableConfig
    from myriad.models import LanguageModel as LanguageModel
    from myriad.models import ModelConfig as ModelConfig
    from myriad.models import TransformerConfig as TransformerConfig
    from myriad.models import build as build
    from myriad.train import RunConfig as RunConfig


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"myriad.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'myriad' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_ROOMS})
