"""A layer of one size with what its measurements share."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from myriad.analysis.bench import bounds
from myriad.analysis.bench.bounds import Phase
from myriad.analysis.bench.report import Contender, Difference, Rates
from myriad.analysis.bench.settings import BenchConfig
from myriad.analysis.bench.timing import interleaved
from myriad.ffn.peer import PEER
from myriad.ffn.retrieval import side_of
from myriad.train.precision import Precision, resolve_precision


class Case(NamedTuple):
    """A layer, its input and the machine."""

    settings: BenchConfig
    layer: PEER
    x_TD: Tensor
    rates: Rates
    device: torch.device

    @property
    def side(self) -> int:
        return side_of(self.layer.config.experts)

    @property
    def shape(self) -> str:
        return shape_of(self.side)

    @property
    def precisions(self) -> list[Precision]:
        return precisions(self.device)

    def time(self, runs: Mapping[Contender, Callable[[], object]]) -> dict[Contender, list[float]]:
        repeats, warmup = self.settings.repeats, self.settings.warmup
        return interleaved(runs, repeats=repeats, warmup=warmup, device=self.device)

    def least(self, phases: Sequence[Phase], times: int = 1) -> dict[str, float]:
        """The least seconds, by precision, of phases that are run so many times."""
        return {name: times * bounds.seconds(phases, self.rates, name) for name in self.precisions}

    @torch.no_grad()
    def distinct(self, x_TD: Tensor) -> int:
        """The experts that some tokens use, each counted once."""
        (routing,) = self.layer(x_TD, with_routing=True).routing
        return len(routing.ids.unique())


def precisions(device: torch.device) -> list[Precision]:
    """float32, and what `auto` chooses."""
    return list(dict.fromkeys(("float32", resolve_precision("auto", device))))


def shape_of(side: int) -> str:
    return f"{side}x{side}"


def table_bytes(settings: BenchConfig, side: int) -> int:
    """Both tables of a layer, in float32."""
    return 2 * side**2 * settings.d_model * 4


def gathered_bytes(settings: BenchConfig) -> int:
    """The rows of all tokens and their active experts, which PEER-pytorch holds for each table, and some room."""
    return 4 * settings.tokens * settings.heads * settings.experts_per_head * settings.d_model * 4


def call_ours(layer: PEER) -> Callable[[Tensor], Tensor]:
    """Our layer as a function of tokens of shape (T, D)."""
    return lambda x_TD: layer(x_TD).y


def call_theirs(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """PEER-pytorch's layer as such a function."""
    return lambda x_TD: layer(x_TD.unsqueeze(0)).squeeze(0)


def difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Difference:
    """How far tensors are from those of the reference: of the worst of them. A dense one may be changed."""
    pairs = [(_minus(found[name], reference), _values(reference)) for name, reference in expected.items()]
    return Difference(
        largest=max(_largest(apart) for apart, _ in pairs),
        relative=max((apart.norm() / reference.norm().clamp(min=1e-30)).item() for apart, reference in pairs),
    )


def _minus(found: Tensor, reference: Tensor) -> Tensor:
    if not reference.is_sparse:
        return (found.to_dense() - reference).float()
    if found.is_sparse:
        return _values(found - reference)
    return found.add_(reference, alpha=-1)  # in place: a dense gradient of a large table takes gigabytes


def _values(tensor: Tensor) -> Tensor:
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def _largest(tensor: Tensor) -> float:
    return max(abs(bound.item()) for bound in tensor.aminmax())
