"""NaN in weights and in gradients, and clocks that lie: what is kept stays whole, and figures stay what they are."""

import itertools
import time
from pathlib import Path

import pytest
import torch

from myriad import checkpoint
from myriad.analysis.compare import load_contender
from myriad.analysis.curve import LearningCurve
from myriad.analysis.measure import measure_run
from myriad.checkpoint import CheckpointError
from myriad.config import RunError
from myriad.evaluate import Perplexity
from myriad.ffn import PEERConfig
from myriad.hf.generation import generate_text
from myriad.train import fit, job, loop
from myriad.train.record import CLOCK_FIELDS, Terminal, read_records
from myriad.train.run import BudgetConfig, TrainConfig
from tiny import tiny_model, tiny_run


def figures(run: Path) -> list[dict]:
    return [
        {name: value for name, value in record.items() if name not in CLOCK_FIELDS}
        for record in read_records(run / "metrics.jsonl")
    ]


def weights(run: Path) -> bytes:
    return (checkpoint.list_checkpoints(run)[-1] / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(store, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    fit(tiny_run(store), folder)
    return folder


def poison(model: torch.nn.Module, where: str, value: float) -> str:
    """Put a value into one matrix, one row of a table, or a running statistic; the tensor's name."""
    state = model.state_dict()
    kinds = {
        "matrix": lambda name, tensor: tensor.ndim == 2 and "attention" in name,
        "row": lambda name, tensor: name.endswith("experts_up"),
        "statistic": lambda name, tensor: name.endswith("running_mean"),
    }
    name = next(name for name, tensor in state.items() if kinds[where](name, tensor))
    state[name].view(-1)[:3] = value
    return name


@pytest.mark.parametrize(
    ("where", "value"), [("matrix", float("nan")), ("row", float("nan")), ("statistic", float("inf"))]
)
def test_broken_weights_stop_the_run_in_a_line_and_never_replace_a_checkpoint(
    store, undisturbed, tmp_path, monkeypatch, where, value
):
    run, folder, names = tiny_run(store), tmp_path / "run", []
    step = loop.train_step

    def poisoned(job):
        record = step(job)
        if record["step"] == 6:
            names.append(poison(job.model, where, value))
        return record

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", poisoned)
        with pytest.raises(
            RunError, match=r"stopped at step 8: the weights are broken .* last checkpoint is kept"
        ) as error:
            fit(run, folder)
    assert "\n" not in str(error.value)
    assert [path.name for path in checkpoint.list_checkpoints(folder)] == ["00000004"]
    checkpoint.refuse_broken_weights(checkpoint.load(folder), folder)
    assert fit(run, folder, resume=True).finished
    assert figures(folder) == figures(undisturbed)
    assert weights(folder) == weights(undisturbed)


@pytest.mark.parametrize("where", ["matrix", "row", "statistic"])
def test_broken_weights_are_neither_evaluated_nor_sampled_from_nor_trained_on(store, undisturbed, tmp_path, where):
    run, folder = tiny_run(store), tmp_path / "run"
    names: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "_refuse_broken", lambda job: names.append(poison(job.model, where, float("nan"))))
        fit(run.model_copy(update={"budget": BudgetConfig(steps=1)}), folder)
    line = rf"the weights are broken \((model\.)?{names[0]} is not finite\)"
    for read in (measure_run, lambda folder: generate_text(folder, "a", max_tokens=2)):
        with pytest.raises(CheckpointError, match=line):
            read(folder)
    with pytest.raises(CheckpointError, match=line):
        fit(run, folder, resume=True)


def test_an_update_that_breaks_the_weights_is_not_saved_though_loss_and_gradients_were_finite(store, tmp_path):
    wild = tiny_run(store).optim.model_copy(update={"lr": 1e300, "warmup": 0})
    with pytest.raises(RunError, match="stopped at step 4: the weights are broken"):
        fit(tiny_run(store, optim=wild), tmp_path / "run")
    assert not checkpoint.list_checkpoints(tmp_path / "run")


def break_gradient(parameters: list[torch.nn.Parameter], kind: str, value: float) -> None:
    sparse = kind == "sparse rows"
    gradient = next(
        parameter.grad
        for parameter in parameters
        if parameter.grad is not None and (parameter.grad.layout == torch.sparse_coo) == sparse
    )
    (gradient._values() if sparse else gradient).view(-1)[0] = value


def with_broken_gradients(monkeypatch, kind: str, value: float, steps: set[int]) -> None:
    clip, count = loop.clip_gradients, itertools.count(1)

    def broken(parameters, largest):
        parameters = list(parameters)
        if next(count) in steps:
            break_gradient(parameters, kind, value)
        return clip(parameters, largest)

    monkeypatch.setattr(loop, "clip_gradients", broken)


def sparse_run(store, **options):
    """A run whose tables are large enough for sparse gradients."""
    peer = PEERConfig(experts=4096, heads=1, experts_per_head=2, d_key=8)
    model = tiny_model(layers=1, d_model=16, ffns={"peer": peer})
    return tiny_run(store, model=model, **options)


@pytest.mark.parametrize("kind", ["dense", "sparse rows"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_gradient_skips_its_update_is_counted_and_touches_nothing(store, tmp_path, monkeypatch, kind, value):
    with_broken_gradients(monkeypatch, kind, value, {3})
    assert fit(sparse_run(store), tmp_path / "run").finished
    skipped = [record["skipped"] for record in figures(tmp_path / "run") if record["kind"] == "train"]
    assert skipped == [0, 0] + [1] * 10
    checkpoint.refuse_broken_weights(checkpoint.load(tmp_path / "run"), "run")


@pytest.mark.parametrize("kind", ["dense", "sparse rows"])
def test_gradients_that_stay_broken_stop_the_run_in_a_line(store, tmp_path, monkeypatch, kind):
    fit(sparse_run(store, budget=BudgetConfig(steps=4)), tmp_path / "run")
    before = weights(tmp_path / "run")
    with_broken_gradients(monkeypatch, kind, float("nan"), set(range(100)))
    run = sparse_run(store, train=TrainConfig(precision="float32", max_skipped=3))
    with pytest.raises(RunError, match=r"stopped at step 7: .* not finite in 3 updates in a row") as error:
        fit(run, tmp_path / "run", resume=True)
    assert "\n" not in str(error.value)
    assert weights(tmp_path / "run") == before


# Clocks

CLOCKS = {
    "stands still": lambda: itertools.repeat(1000.0),
    "runs backwards": lambda: itertools.count(2e9, -3600.0),
    "jumps back and forth": lambda: itertools.cycle([1e9, 5.0, 4e9, 0.0]),
    "jumps by a century": lambda: itertools.count(0.0, 3.15e9),
}


@pytest.mark.parametrize("name", CLOCKS)
def test_whatever_the_clock_does_a_run_gives_the_same_figures(store, undisturbed, tmp_path, monkeypatch, name):
    for clock in ("time", "perf_counter", "monotonic"):
        ticks = CLOCKS[name]()
        monkeypatch.setattr(time, clock, lambda ticks=ticks: next(ticks))
    folder = tmp_path / "run"
    fit(tiny_run(store), folder, display=Terminal("run"), trackers=[LearningCurve])
    monkeypatch.undo()
    assert figures(folder) == figures(undisturbed)
    assert weights(folder) == weights(undisturbed)
    assert (folder / "learning-curve.png").read_bytes().startswith(b"\x89PNG")
    for record in read_records(folder / "metrics.jsonl"):
        assert record["seconds"] >= 0
        assert record.get("tokens_per_second") is None or record["tokens_per_second"] >= 0
    contender = load_contender(folder, "x", Perplexity(1.0, 10, 2, 10, 8, 8), "validation")
    assert contender.seconds is not None
    assert contender.tokens_per_second is None or contender.tokens_per_second >= 0


def test_a_terminal_shows_no_speed_of_a_step_that_took_no_time(capsys):
    terminal = Terminal("run")
    terminal.show({"kind": "train", "step": 1, "loss": 1.0, "tokens_per_second": None})
    terminal.show({"kind": "validation", "step": 1, "loss": 1.0, "bits_per_byte": 2.0})
    assert capsys.readouterr().err == "step 1: validation loss 1.0000, 2.0000 bits per byte\n"
