"""The memory of a layer's training step beyond weights and moments, each contender's in a process of its own.

A process that has measured other things holds memory which a step may use again, unseen: of its allocators, and
scratch arrays that kernels keep from step to step. In a fresh one all of it counts. The figure is the peak of a step,
less what the process held before the first one (compiled code, libraries, the input) and less weights and moments.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import torch

from myriad import distributed, kernels
from myriad.analysis.bench import peer_pytorch
from myriad.analysis.bench.case import shape_of, table_bytes
from myriad.analysis.bench.memory import held_bytes, lack, peak_bytes, resident_bytes, tells_peak
from myriad.analysis.bench.report import BASE, OURS, THEIRS, Contender, Measurement, absent, compared
from myriad.analysis.bench.settings import BenchConfig
from myriad.analysis.bench.step import Step, Trained, our_bytes, our_training, their_bytes, their_training

RUNS = 3
NOT_TOLD = "this system does not tell the peak of a part of a run"


def peak_memory(settings: BenchConfig, side: int, device: torch.device) -> Iterator[Measurement]:
    """The peak of both, in float32."""
    what, shape = "layer peak memory", shape_of(side)
    mine = table_bytes(settings, side) + our_bytes(settings, side, device)
    needed = {THEIRS: their_bytes(settings, side), OURS: mine}
    taken: dict[Contender, list[float]] = {}
    for contender in (BASE, Contender(OURS, "float32")):
        why = peer_pytorch.missing() if contender == BASE else None
        why = why or (None if tells_peak(device) else NOT_TOLD) or lack(needed[contender.who], device)
        found = why or measured_elsewhere(settings, side, contender.who)
        if isinstance(found, str):
            yield absent(what, shape, "MB", contender.who, found)
        else:
            taken[contender] = found
    yield from compared(what, shape, taken, "MB", scale=1e-6)


def measured_elsewhere(settings: BenchConfig, side: int, who: str) -> list[float] | str:
    """What `measure` returns in a process of its own, or why there is nothing."""
    order = {"settings": settings.model_dump(mode="json"), "side": side, "who": who}
    order["threads"] = torch.get_num_threads()
    command = [sys.executable, "-m", __name__, json.dumps(order)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.splitlines() or [""])[-1]
        return f"its process ended with code {done.returncode} {last}".rstrip()
    return json.loads(done.stdout.splitlines()[-1])


def measure(settings: BenchConfig, side: int, who: str) -> list[float]:
    """The bytes of some steps, each at its peak, in this process."""
    device = distributed.device()
    contender = Contender(OURS, "float32") if who == OURS else BASE
    with kernels.use(settings.kernels):
        _compile(settings, contender, device)
        step, trained = _prepare(settings, side, who, device)
        before = held_bytes(device) - resident_bytes(trained.module.parameters())
        for _ in range(settings.warmup):
            step(contender)
        peaks = [peak_bytes(partial(step, contender), device) for _ in range(RUNS)]
    moments = [value for state in trained.optimizer.state.values() for value in state.values()]
    lasting = resident_bytes([*trained.module.parameters(), *(one for one in moments if torch.is_tensor(one))])
    return [float(max(0, peak - before - lasting)) for peak in peaks]


def _compile(settings: BenchConfig, contender: Contender, device: torch.device) -> None:
    """Make the first calls, with dense and with sparse gradients, on one token: what they compile stays for ever."""
    for side in (4, 64):
        step, _ = _prepare(settings.model_copy(update={"tokens": 1}), side, contender.who, device)
        step(contender)


def _prepare(settings: BenchConfig, side: int, who: str, device: torch.device) -> tuple[Step, Trained]:
    torch.manual_seed(settings.seed)
    with device:
        layer = settings.layer(side).build(settings.d_model)
        x_TD = torch.randn(settings.tokens, settings.d_model)
    trained = our_training(layer) if who == OURS else their_training(layer, share=True)
    return Step({who: trained}, x_TD), trained


def main() -> None:
    """Do what the only argument says, and write the figures."""
    order = json.loads(sys.argv[1])
    torch.set_num_threads(order["threads"])
    found = measure(BenchConfig.model_validate(order["settings"]), order["side"], order["who"])
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
