"""Language models on WikiText-103 with GPT-2's tokens: PEER layers of two sizes, and their dense twins.

All have 8 blocks of width 256 with 8 attention heads, and PEER layers of 8 heads that retrieve 16 experts each.
"""

from myriad.ffn import DenseConfig, FFNConfig, PEERConfig, StackConfig
from myriad.models import TransformerConfig
from myriad.presets.twins import dense_twin
from myriad.train.optim import OptimConfig
from myriad.train.run import BatchConfig, BudgetConfig, DataConfig, EvaluationConfig, RunConfig

D_MODEL = 256
PEER_256 = PEERConfig(experts=256**2)
PEER_512 = StackConfig(layers=[PEERConfig(experts=512**2)] * 2)
PEER_1024 = PEERConfig(experts=1024**2)


def _run(ffns: dict[str, FFNConfig], pattern: list[str]) -> RunConfig:
    return RunConfig(
        model=TransformerConfig(context=512, layers=8, d_model=D_MODEL, heads=8, ffns=ffns, pattern=pattern),
        data=DataConfig(
            source="Salesforce/wikitext:wikitext-103-raw-v1",
            tokenizer="gpt2",
            document_start=r"^ = [^=].* = $",  # a row is a line; articles begin with a heading
        ),
        optim=OptimConfig(lr=2e-3, warmup=200),
        budget=BudgetConfig(epochs=1),
        batch=BatchConfig(tokens=32_768),
        evaluation=EvaluationConfig(every=500),
    )


def peer_256() -> RunConfig:
    """PEER with 256x256 experts in every block, on WikiText-103 with GPT-2's tokens."""
    return _run({"peer": PEER_256}, ["peer"])


def dense_256() -> RunConfig:
    """The dense twin of peer-256x256: equal FLOPs per token."""
    return _run({"dense": dense_twin(PEER_256, D_MODEL)}, ["dense"])


def peer_512() -> RunConfig:
    """Two PEER layers with 512x512 experts each in every block, 2.2 B parameters, on WikiText-103."""
    return _run({"peers": PEER_512}, ["peers"])


def dense_512() -> RunConfig:
    """The dense twin of peer-512x512: equal FLOPs per token."""
    return _run({"dense": dense_twin(PEER_512, D_MODEL)}, ["dense"])


def peer_paper() -> RunConfig:
    """The paper's placement: a million experts in the middle block, dense layers in the others, on WikiText-103."""
    ffns: dict[str, FFNConfig] = {"dense": DenseConfig(d_hidden=4 * D_MODEL), "peer": PEER_1024}
    return _run(ffns, ["dense"] * 4 + ["peer"] + ["dense"] * 3)
