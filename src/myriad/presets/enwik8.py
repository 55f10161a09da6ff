"""Language models of the bytes of enwik8: its first 90 M bytes train, 5 M validate, the last 5 M test."""

from myriad.ffn import FFNConfig, PEERConfig
from myriad.models import TransformerConfig
from myriad.presets.twins import dense_twin
from myriad.train.optim import OptimConfig
from myriad.train.run import BatchConfig, BudgetConfig, DataConfig, EvaluationConfig, RunConfig

D_MODEL = 256
PEER = PEERConfig(experts=128**2)


def _run(ffns: dict[str, FFNConfig]) -> RunConfig:
    (name,) = ffns
    return RunConfig(
        model=TransformerConfig(context=512, layers=8, d_model=D_MODEL, heads=8, ffns=ffns, pattern=[name]),
        data=DataConfig(source="enwik8", tokenizer="bytes", split_bytes=(90_000_000, 5_000_000, 5_000_000)),
        optim=OptimConfig(lr=2e-3, warmup=200),
        budget=BudgetConfig(epochs=1),
        batch=BatchConfig(tokens=32_768, micro_tokens=16_384),
        evaluation=EvaluationConfig(every=500, tokens=500_000),
    )


def peer() -> RunConfig:
    """PEER with 128x128 experts in every block, on the bytes of the file enwik8 in the current folder."""
    return _run({"peer": PEER})


def dense() -> RunConfig:
    """The dense twin of enwik8-peer: equal FLOPs per token."""
    return _run({"dense": dense_twin(PEER, D_MODEL)})
