"""The demo: a small PEER model and its twins, dense and mixed, on the Python standard library's own sources.

Small enough for two CPU cores and a few minutes each. Memories stand beside them: sized by hand to the same FLOPs.
"""

from myriad.ffn import (
    ExpertChoiceConfig,
    FFNConfig,
    PEERConfig,
    ProductKeyMemoryConfig,
    TableConfig,
    TokenChoiceConfig,
)
from myriad.models import TransformerConfig
from myriad.presets.twins import dense_twin, mixture_twin
from myriad.train.optim import OptimConfig
from myriad.train.run import BatchConfig, BudgetConfig, DataConfig, EvaluationConfig, RunConfig

D_MODEL = 192
PEER = PEERConfig(experts=64**2, heads=4, experts_per_head=16, d_key=32)
MEMORY = ProductKeyMemoryConfig(memories=64**2, heads=4, memories_per_head=32, d_key=32)
MEMORY_PLUS = ProductKeyMemoryConfig.memory_plus(
    memories=128**2, heads=4, memories_per_head=32, d_key=16, d_value=96, table="memories"
)
MEMORIES = {"memories": TableConfig(rows=128**2, width=96)}


def _run(ffns: dict[str, FFNConfig], tables: dict[str, TableConfig] | None = None) -> RunConfig:
    (name,) = ffns
    return RunConfig(
        model=TransformerConfig(
            context=256, layers=4, d_model=D_MODEL, heads=6, ffns=ffns, pattern=[name], tables=tables or {}
        ),
        data=DataConfig(source="python", tokenizer="bpe:4096"),
        optim=OptimConfig(lr=3e-3, table_lr=3e-3, warmup=30, final_lr=0.05),
        budget=BudgetConfig(tokens=450_000),
        batch=BatchConfig(tokens=2048),
        evaluation=EvaluationConfig(every=50, tokens=16_384),
    )


def peer() -> RunConfig:
    """A small PEER model on the Python standard library's own sources, for two CPU cores."""
    return _run({"peer": PEER})


def dense() -> RunConfig:
    """The dense twin of demo-peer: equal FLOPs per token."""
    return _run({"dense": dense_twin(PEER, D_MODEL)})


def token_choice() -> RunConfig:
    """The token-choice twin of demo-peer: 8 experts of which each token chooses 2, equal FLOPs per token."""
    return _run({"token_choice": mixture_twin(TokenChoiceConfig(), PEER, D_MODEL)})


def expert_choice() -> RunConfig:
    """The expert-choice twin of demo-peer: 8 experts, 2 for a token on average, equal FLOPs per token."""
    return _run({"expert_choice": mixture_twin(ExpertChoiceConfig(), PEER, D_MODEL)})


def product_key_memory() -> RunConfig:
    """The twin of demo-peer with product-key memories of 64x64 values: equal FLOPs per token."""
    return _run({"memory": MEMORY})


def memory_plus() -> RunConfig:
    """The twin of demo-peer with Memory+: all four blocks read one table of 128x128 values, at equal FLOPs."""
    return _run({"memory": MEMORY_PLUS}, MEMORIES)
