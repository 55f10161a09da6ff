"""What a benchmark tells: one `Measurement` for every figure, and on what they were taken. Written as JSON."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import median, quantiles
from typing import Literal, NamedTuple

from myriad.config import Config
from myriad.train.precision import Precision

What = Literal[
    "layer forward", "layer training step", "layer peak memory", "layer decode", "model training", "model decode"
]
Unit = Literal["ms", "MB", "tokens/s"]


class Contender(NamedTuple):
    """One of those that are compared."""

    who: str
    precision: Precision


OURS = "myriad"
DEFAULT = "myriad, shared keys"
"""Our layer as presets have it: heads share their keys, and queries are normalised."""
THEIRS = "PEER-pytorch"
BASE = Contender(THEIRS, "float32")
"""Whom the others are compared with."""


class Spread(Config):
    """Several runs of the same thing."""

    median: float
    low: float
    """The lower quartile."""
    high: float
    """The upper quartile."""
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        low, high = values[0], values[0]
        if len(values) > 1:
            low, _, high = quantiles(values, n=4, method="inclusive")
        return cls(median=median(values), low=low, high=high, runs=len(values))


class Difference(Config):
    """How far a result is from that of our reference kernels in float32."""

    largest: float
    """The largest absolute difference of two elements."""
    relative: float
    """The norm of the difference over the norm of the reference; of several tensors, the largest."""


class Measurement(Config):
    """One figure of one contender, or why there is none."""

    what: What
    shape: str
    """The number of experts of a layer, `256x256` say, or the name of a model."""
    who: str
    precision: str
    unit: Unit
    value: Spread | None = None
    ratio: Spread | None = None
    """How many times better than PEER-pytorch in float32: the runs are compared in pairs that lie side by side."""
    growth: float | None = None
    """The median over that of the smallest number of experts."""
    difference: Difference | None = None
    """Of outputs; for a training step, of the gradients of every parameter and of the input."""
    bound: float | None = None
    """The best that the measured bandwidth and arithmetic allow, in the same unit."""
    in_turns: bool = True
    """False: the contenders ran one after the other, since the memory does not hold both."""
    missing: str | None = None
    """Why there is no value."""


class Rates(Config):
    """What the machine does at its best, measured in the same run."""

    copy_bytes: float
    """Bytes per second read and written by a copy."""
    read_bytes: float
    """Bytes per second read by a sum."""
    gather_bytes: float
    """Bytes per second read by sums of random rows of a table."""
    float32_flops: float
    """Floating point operations per second of a matrix product."""
    bfloat16_flops: float

    @property
    def bytes(self) -> float:
        """The highest bandwidth that was seen: a bound takes the best."""
        return max(self.copy_bytes, self.read_bytes, self.gather_bytes)

    def flops(self, precision: str) -> float:
        """The highest rate that a precision allows."""
        if precision == "float32":
            return self.float32_flops
        return max(self.float32_flops, self.bfloat16_flops)


class Report(Config):
    """A whole run of the benchmark."""

    time: str
    device: str
    processor: str
    threads: int
    versions: dict[str, str | None]
    """None: not installed."""
    kernels: dict[str, str]
    """Op -> implementation (reason)."""
    settings: dict
    """Of the benchmark, from which it can be repeated."""
    models: list[dict]
    """The models that were measured."""
    rates: Rates
    measurements: list[Measurement]


def compared(
    what: What,
    shape: str,
    amounts: Mapping[Contender, Sequence[float]],
    unit: Unit,
    *,
    scale: float = 1,
    differences: Mapping[Contender, Difference] | None = None,
    bounds: Mapping[str, float] | None = None,
    in_turns: bool = True,
) -> Iterator[Measurement]:
    """The measurements of contenders.

    Args:
        what, shape, unit: of all.
        amounts: seconds or bytes of each run of each contender.
        scale: one amount in the unit; for rates, what the rate counts in one run.
        differences: of those that were compared with the reference.
        bounds: the least amount, by precision.
        in_turns: whether the contenders took turns.
    """

    def in_unit(amount: float) -> float:
        return scale / amount if unit == "tokens/s" else scale * amount

    for contender, runs in amounts.items():
        bound = (bounds or {}).get(contender.precision)
        yield Measurement(
            what=what,
            shape=shape,
            who=contender.who,
            precision=contender.precision,
            unit=unit,
            value=Spread.of([in_unit(amount) for amount in runs]),
            ratio=paired_ratio(amounts.get(BASE), runs),
            difference=(differences or {}).get(contender),
            bound=None if bound is None else in_unit(bound),
            in_turns=in_turns,
        )


def absent(what: What, shape: str, unit: Unit, who: str, why: str) -> Measurement:
    """A measurement that could not be taken."""
    return Measurement(what=what, shape=shape, who=who, precision="float32", unit=unit, missing=why)


def paired_ratio(base: Sequence[float] | None, mine: Sequence[float]) -> Spread | None:
    """The spread of base over mine, pair by pair; None without a base, or if nothing was taken."""
    if base is None or 0 in mine:
        return None
    return Spread.of([theirs / ours for theirs, ours in zip(base, mine, strict=True)])


def with_growth(found: Sequence[Measurement]) -> list[Measurement]:
    """The measurements, those of layers with their growth over the number of experts."""
    smallest: dict[tuple[str, str, str], float] = {}
    grown = []
    for one in found:
        if one.value is not None and one.what.startswith("layer"):
            first = smallest.setdefault((one.what, one.who, one.precision), one.value.median)
            growth = one.value.median / first if first else None
            one = one.model_copy(update={"growth": growth})
        grown.append(one)
    return grown
