"""One PEER layer of one size: its forward pass, one token at a time, and (`step.py`) its training step."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from myriad import kernels
from myriad.analysis.bench import bounds, peer_pytorch
from myriad.analysis.bench.bounds import Batch
from myriad.analysis.bench.case import Case, call_ours, call_theirs, difference, gathered_bytes, shape_of, table_bytes
from myriad.analysis.bench.memory import lack
from myriad.analysis.bench.peak import peak_memory
from myriad.analysis.bench.report import DEFAULT, OURS, THEIRS, Contender, Measurement, Rates, What, absent, compared
from myriad.analysis.bench.settings import BenchConfig
from myriad.analysis.bench.step import training_step
from myriad.ffn.peer import PEER
from myriad.ffn.retrieval import Queries
from myriad.train.precision import autocast


def measure_layer(
    settings: BenchConfig, side: int, rates: Rates, device: torch.device, say: Callable[[str], None]
) -> Iterator[Measurement]:
    """All of one size that the settings ask for and the memory allows."""
    asked = _asked(settings, side)
    if not asked:
        return
    if why := lack(table_bytes(settings, side) + gathered_bytes(settings), device):
        yield from (absent(what, shape_of(side), "ms", OURS, why) for what in asked)
        return
    if "layer training step" in asked:  # before this process holds tables: others need the memory
        say(f"layer peak memory, {shape_of(side)} experts")
        yield from peak_memory(settings, side, device)
    say(f"layer of {shape_of(side)} experts: making its weights")
    torch.manual_seed(settings.seed)
    with device:
        layer = settings.layer(side).build(settings.d_model)
        x_TD = torch.randn(settings.tokens, settings.d_model)
    case = Case(settings, layer, x_TD, rates, device)
    for what, measure in asked.items():
        say(f"{what}, {case.shape} experts")
        yield from measure(case)


def _asked(settings: BenchConfig, side: int) -> dict[What, Callable[[Case], Iterator[Measurement]]]:
    found: dict[What, Callable[[Case], Iterator[Measurement]]] = {}
    if "forward" in settings.parts:
        found["layer forward"] = forward
    if "decode" in settings.parts:
        found["layer decode"] = decode
    if "step" in settings.parts and side <= settings.largest_trained:
        found["layer training step"] = training_step
    return found


def forward(case: Case) -> Iterator[Measurement]:
    """The forward pass without gradients. The tables of both layers lie in the same memory."""
    if why := peer_pytorch.missing():
        yield absent("layer forward", case.shape, "ms", THEIRS, why)
    by_name = _calls(case)

    @torch.no_grad()
    def run(contender: Contender) -> Tensor:
        with autocast(contender.precision, case.device):
            return by_name[contender.who](case.x_TD)

    contenders = [Contender(who, precision) for who in by_name for precision in case.precisions]
    runs = {contender: partial(run, contender) for contender in contenders}
    with kernels.use("reference"):
        expected = {"y": runs[Contender(OURS, "float32")]()}
    differences = {contender: difference({"y": run()}, expected) for contender, run in runs.items()}
    batch = Batch(len(case.x_TD), case.distinct(case.x_TD))
    phases = bounds.forward_phases(case.layer.config, case.settings.d_model, batch)
    seconds = case.time(runs)
    yield from compared(
        "layer forward", case.shape, seconds, "ms", scale=1e3, differences=differences, bounds=case.least(phases)
    )


def decode(case: Case) -> Iterator[Measurement]:
    """One token at a time, in float32; a run takes several, with experts of their own."""
    if why := peer_pytorch.missing():
        yield absent("layer decode", case.shape, "ms", THEIRS, why)
    tokens = case.x_TD[: case.settings.decoded].split(1)

    @torch.no_grad()
    def run(call: Callable[[Tensor], Tensor]) -> None:
        for token_1D in tokens:
            call(token_1D)

    default = case._replace(layer=_as_in_presets(case.layer).eval())
    calls = _calls(case) | {DEFAULT: call_ours(default.layer)}
    seconds = case.time({Contender(who, "float32"): partial(run, call) for who, call in calls.items()})
    for one, who in ((case, {THEIRS, OURS}), (default, {DEFAULT})):
        distinct = sum(one.distinct(token_1D) for token_1D in tokens) / len(tokens)
        phases = bounds.forward_phases(one.layer.config, one.settings.d_model, Batch(1, distinct))
        least, scale = one.least(phases, len(tokens)), 1e3 / len(tokens)
        found = compared("layer decode", one.shape, seconds, "ms", scale=scale, bounds=least)
        yield from (measurement for measurement in found if measurement.who in who)


def _as_in_presets(layer: PEER) -> PEER:
    """The same tables, behind keys that the heads share and queries that are normalised."""
    config = layer.config.model_copy(update={"shared_keys": True, "query_norm": "batch"})
    d_model = layer.queries.proj.in_features
    with torch.device("meta"):  # tables of its own would take memory and time
        default = config.build(d_model)
    default.experts_down, default.experts_up = layer.experts_down, layer.experts_up
    with layer.keys.device:
        default.queries = Queries(d_model, config.heads, config.d_key, config.query_norm)
    default.keys = torch.nn.Parameter(layer.keys.detach()[0])
    return default


def _calls(case: Case) -> dict[str, Callable[[Tensor], Tensor]]:
    """Whose layer -> its function, in eval mode; PEER-pytorch's has our tables."""
    ours = call_ours(case.layer.eval())
    if not peer_pytorch.installed():
        return {OURS: ours}
    return {THEIRS: call_theirs(peer_pytorch.their_layer(case.layer, share=True)), OURS: ours}
