"""What is measured, and how often."""

from typing import Literal, Self

from pydantic import Field, PositiveInt, field_validator

from myriad.config import Config
from myriad.ffn import FFNConfig, PEERConfig, StackConfig
from myriad.models import TransformerConfig

Part = Literal["forward", "step", "decode", "model"]


class BenchConfig(Config):
    """The layer that is measured, and the runs. The sizes are those of the paper's layer at width 256."""

    parts: tuple[Part, ...] = ("forward", "step", "decode", "model")
    """Of the layer: `forward`, `step` (training step and peak memory) and `decode`; and whole models."""
    sides: tuple[PositiveInt, ...] = Field(default=(256, 512, 1024, 2048), min_length=1)
    """Sub-keys of each half: side**2 experts."""
    largest_trained: PositiveInt = 1024
    """Sides beyond this one are not trained: the moments would not fit."""
    tokens: PositiveInt = 1024
    """Of a layer's forward pass and training step."""
    d_model: PositiveInt = 256
    heads: PositiveInt = 8
    experts_per_head: PositiveInt = 16
    d_key: PositiveInt = 128
    decoded: PositiveInt = 256
    """Tokens that a layer takes one by one in a run: their rows exceed the caches, as those of a long text do."""
    generated: PositiveInt = 64
    """Tokens that a model generates in a run."""
    repeats: int = Field(default=7, ge=1, le=1000)
    """Timed runs of each contender."""
    warmup: PositiveInt = 2
    """Runs before: first calls compile, and make the moments."""
    megabytes: PositiveInt = 256
    """Size of the tensors whose movement is timed."""
    matrix: PositiveInt = 2048
    """Side of the matrices whose product is timed."""
    kernels: str = "auto"
    seed: int = Field(default=0, ge=0, lt=2**63)

    @field_validator("parts", "sides")
    @classmethod
    def _each_once(cls, values: tuple) -> tuple:
        return tuple(dict.fromkeys(values))

    @classmethod
    def quick(cls) -> Self:
        """Small sizes and few runs: that it works, not how fast."""
        return cls(
            sides=(64, 128),
            tokens=128,
            d_model=64,
            heads=4,
            experts_per_head=8,
            d_key=32,
            decoded=4,
            generated=8,
            repeats=3,
            warmup=1,
            megabytes=16,
            matrix=512,
        )

    def layer(self, side: int) -> PEERConfig:
        """The layer of a size, with the options under which PEER-pytorch's computes the same."""
        return PEERConfig(
            experts=side**2,
            heads=self.heads,
            experts_per_head=min(self.experts_per_head, side**2),
            d_key=self.d_key,
            shared_keys=False,
            query_norm="none",
        )


class ModelShape(Config):
    """A whole model, and what it is trained on."""

    name: str
    model: TransformerConfig
    sequences: PositiveInt
    length: PositiveInt
    """Tokens of a sequence."""
    decode: bool = False
    """Whether generation is timed too."""

    @property
    def tokens(self) -> int:
        """Of a training step."""
        return self.sequences * self.length

    def peer_layers(self) -> list[PEERConfig]:
        """The PEER layers of all blocks, those in stacks too."""
        return [layer for name in self.model.placement for layer in _peer_layers(self.model.ffns[name])]


def _peer_layers(ffn: FFNConfig) -> list[PEERConfig]:
    if isinstance(ffn, StackConfig):
        return [layer for part in ffn.layers for layer in _peer_layers(part)]
    return [ffn] if isinstance(ffn, PEERConfig) else []
