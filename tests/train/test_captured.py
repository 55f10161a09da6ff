"""Captured passes give the run that launched ones give: in bookkeeping on the CPU, and in truth on a GPU."""

import signal
from collections.abc import Callable, Iterable
from contextlib import nullcontext

import pytest
import torch
import yaml
from pydantic import ValidationError
from torch import Tensor, nn

from calling import call_in_a_fresh_process
from myriad import distributed
from myriad.config import ConfigError
from myriad.ffn import DenseConfig, ExpertChoiceConfig, PEERConfig, ProductKeyMemoryConfig, TableConfig
from myriad.kernels.table_gradient import dense_gradients
from myriad.models import LanguageModel
from myriad.train import fit, session
from myriad.train.captured import Captured, CudaGraphs, Recording
from myriad.train.loop import seed_step
from myriad.train.optim import OptimConfig
from myriad.train.passes import ForwardBackward, Launched, PassOutput
from myriad.train.record import CLOCK_FIELDS, Silent, read_records
from myriad.train.replica import Replica
from myriad.train.run import BatchConfig, BudgetConfig, EvaluationConfig, RunConfig, TrainConfig
from tiny import tiny_model, tiny_run

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

MEMORY = {"memories": 64, "heads": 2, "memories_per_head": 4, "d_key": 8}
CASES = {
    "one micro-batch": {},
    "three micro-batches": {"batch": BatchConfig(tokens=384, micro_tokens=128)},
    "clipped": {"optim": OptimConfig(lr=1e-2, warmup=2, clip=0.05), "batch": BatchConfig(tokens=256, micro_tokens=128)},
    "dropout": {"model": tiny_model(dropout=0.3), "batch": BatchConfig(tokens=256, micro_tokens=128)},
    "frozen": {"optim": OptimConfig(lr=1e-2, warmup=2, frozen=["embedding", "blocks.0"])},
    "bfloat16 products": {"train": TrainConfig(precision="bfloat16")},
    "bfloat16 weights": {"optim": OptimConfig(lr=1e-2, warmup=2, weights="bfloat16"), "train": TrainConfig()},
    "dense": {"model": tiny_model(ffns={"d": DenseConfig(activation="swiglu")}, pattern=["d"])},
    "shared table": {
        "model": tiny_model(
            ffns={"m": ProductKeyMemoryConfig.memory_plus(**MEMORY, table="values")},
            pattern=["m"],
            tables={"values": TableConfig(rows=64)},
        )
    },
    "expert choice": {"model": tiny_model(ffns={"e": ExpertChoiceConfig(experts=4, d_expert=16)}, pattern=["e"])},
}
SPARSE = PEERConfig(experts=64**2, heads=2, experts_per_head=2, d_key=8)
"""Launched, its tables have sparse gradients of 256 tokens."""


def run_of(store, **options) -> RunConfig:
    six_steps = {"budget": BudgetConfig(steps=6), "evaluation": EvaluationConfig(every=3, tokens=512)}
    return tiny_run(store, **{**six_steps, **options})


def with_graph(run: RunConfig) -> RunConfig:
    return run.model_copy(update={"train": run.train.model_copy(update={"cuda_graph": True})})


def figures(folder) -> list[dict]:
    records = read_records(folder / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in CLOCK_FIELDS} for record in records]


def weights(folder) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def losses(folder) -> list[float]:
    return [record["loss"] for record in figures(folder)]


def assert_the_same_run(run: RunConfig, folder) -> None:
    """Launched and captured, to the last bit: the kernels, their order and their inputs are the same."""
    fit(run, folder / "launched")
    fit(with_graph(run), folder / "captured")
    assert figures(folder / "captured") == figures(folder / "launched")
    assert weights(folder / "captured") == weights(folder / "launched")


class StopsAfter(Silent):
    """A display that asks this process to stop after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def show(self, record) -> None:
        if record["kind"] == "train" and record["step"] == self.step:
            signal.raise_signal(signal.SIGTERM)


def assert_resuming_changes_nothing(run: RunConfig, folder) -> None:
    """A run that is stopped twice, and goes on captured and launched in turn."""
    fit(run, folder / "whole")
    for step, some in [(2, with_graph(run)), (4, run)]:
        stopped = fit(some, folder / "stopped", resume=True, display=StopsAfter(step))
        assert stopped.step == step
    assert fit(with_graph(run), folder / "stopped", resume=True).finished
    assert figures(folder / "stopped") == figures(folder / "whole")
    assert weights(folder / "stopped") == weights(folder / "whole")


class Reenacted:
    """Stands for CUDA graphs: a replay calls the function again, and leaves results where its capture left them."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.replayed: list[int] = []
        """The numbers of the recordings that were replayed."""
        self.recordings = 0

    def aside(self):
        return nullcontext()

    def record(self, function: Callable[[], PassOutput]) -> Recording:
        number, self.recordings = self.recordings, self.recordings + 1
        writes = all(parameter.grad is None for parameter in self.parameters)
        output = function()
        gradients = {parameter: parameter.grad for parameter in self.parameters}

        def replay() -> None:
            self.replayed.append(number)
            for parameter, gradient in gradients.items():
                assert parameter.grad is gradient
                parameter.grad = None if writes else gradient
            with dense_gradients():  # as it was captured
                _fill(output, function())
            for parameter, gradient in gradients.items():
                if gradient is not None and parameter.grad is not gradient:
                    gradient.copy_(parameter.grad)
                    parameter.grad = gradient

        # A capture computes nothing: what it leaves is not to be read.
        for value in (*_leaves(output), *(value for value in gradients.values() if value is not None)):
            value.fill_(float("nan") if value.is_floating_point() else -1)
        return Recording(replay, output)


def _leaves(output: PassOutput) -> list[Tensor]:
    return [output.loss, output.aux_loss, *(value for load in output.loads for value in load.values())]


def _fill(output: PassOutput, values: PassOutput) -> None:
    for place, value in zip(_leaves(output), _leaves(values), strict=True):
        place.copy_(value)


@pytest.fixture
def cpu(monkeypatch) -> None:
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cpu"))


@pytest.fixture
def reenacted(cpu, monkeypatch) -> None:
    """Runs with `train.cuda_graph` go on the CPU."""

    def captured(launched: ForwardBackward, ids: Tensor, targets: Tensor, parameters, recorder: None, **options):
        parameters = list(parameters)
        return Captured(launched, ids, targets, parameters, Reenacted(parameters), **options)

    monkeypatch.setattr(session, "_refuse_graph", lambda run: None)
    monkeypatch.setattr(session, "CudaGraphs", lambda device: None)
    monkeypatch.setattr(session, "Captured", captured)


@pytest.mark.usefixtures("reenacted")
class TestBookkeeping:
    @pytest.mark.parametrize("case", CASES)
    def test_a_run_is_the_launched_one(self, store, tmp_path, case):
        assert_the_same_run(run_of(store, **CASES[case]), tmp_path)

    def test_resuming_changes_nothing(self, store, tmp_path):
        assert_resuming_changes_nothing(run_of(store, **CASES["dropout"]), tmp_path)

    def test_sparse_gradients_become_dense_ones(self, store, tmp_path):
        """The norm is then a sum over more zeros: equal but for rounding."""
        run = run_of(store, model=tiny_model(ffns={"p": SPARSE}, pattern=["p"]))
        fit(run, tmp_path / "launched")
        fit(with_graph(run), tmp_path / "captured")
        assert losses(tmp_path / "captured") == pytest.approx(losses(tmp_path / "launched"), rel=1e-5)


class TestPasses:
    """A model's passes by themselves."""

    IDS = torch.arange(64).view(2, 32)

    def passes(self, *, accumulates: bool) -> tuple[LanguageModel, Reenacted, Captured]:
        torch.manual_seed(0)
        model = tiny_model(vocab_size=64).build()
        model.get_parameter("norm.weight").requires_grad_(False)
        launched = Launched(Replica(model), nullcontext, torch.device("cpu"), targets=64, passes=1)
        recorder = Reenacted(model.parameters())
        captured = Captured(launched, self.IDS, self.IDS, model.parameters(), recorder, accumulates=accumulates)
        return model, recorder, captured

    def test_a_step_writes_its_gradients_and_then_adds_to_them(self):
        model, recorder, captured = self.passes(accumulates=True)
        assert all(parameter.grad is None for parameter in model.parameters())
        found = []
        for _ in range(2):
            for _ in range(3):
                captured(self.IDS, self.IDS)
            found.append([parameter.grad for parameter in model.parameters()])
            model.zero_grad(set_to_none=True)
        assert recorder.replayed == [0, 1, 1, 0, 1, 1]
        assert all(one is other for one, other in zip(*found, strict=True))
        names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        without = {name for (name, _), grad in zip(model.named_parameters(), found[0], strict=True) if grad is None}
        assert names.isdisjoint(without)
        assert without == {"norm.weight"}

    def test_what_was_returned_stays_as_it_is(self):
        _, _, captured = self.passes(accumulates=True)
        first = captured(self.IDS, self.IDS)
        before = [value.clone() for value in _leaves(first)]
        captured(self.IDS, self.IDS.flip(1))
        assert all(torch.equal(one, other) for one, other in zip(_leaves(first), before, strict=True))

    def test_micro_batches_have_one_shape(self):
        _, _, captured = self.passes(accumulates=False)
        with pytest.raises(ValueError, match=r"captured for micro-batches of shape \(2, 32\), not \(1, 32\)"):
            captured(self.IDS[:1], self.IDS[:1])

    def test_a_step_of_one_micro_batch_has_no_second(self):
        _, recorder, captured = self.passes(accumulates=False)
        assert recorder.recordings == 1
        captured(self.IDS, self.IDS)
        with pytest.raises(ValueError, match="captured for steps of one micro-batch"):
            captured(self.IDS, self.IDS)

    def test_sparse_gradients_of_other_origin_are_refused(self):
        embedding = nn.Embedding(64, 4, sparse=True)

        def launched(ids: Tensor, targets: Tensor) -> PassOutput:
            embedding(ids).sum().backward()
            return PassOutput(torch.zeros(()), torch.zeros(()), ())

        recorder = Reenacted([])
        with pytest.raises(ConfigError, match=r"train\.cuda_graph: this model has sparse gradients"):
            Captured(launched, self.IDS, self.IDS, embedding.parameters(), recorder, accumulates=True)


class TestRefusals:
    @pytest.mark.usefixtures("cpu")
    def test_without_a_cuda_device(self, store, tmp_path):
        with pytest.raises(ConfigError, match=r"train\.cuda_graph: needs a CUDA device, of which there is none here"):
            fit(with_graph(run_of(store)), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_with_several_processes(self, store, tmp_path, monkeypatch):
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        with pytest.raises(ConfigError, match=r"train\.cuda_graph: is for one process alone, not for 2"):
            session._refuse_graph(with_graph(run_of(store)))

    def test_with_activation_checkpointing(self, store):
        with pytest.raises(
            ValidationError, match=r"train\.cuda_graph: not with train\.activation_checkpointing = true"
        ):
            run_of(store, train=TrainConfig(cuda_graph=True, activation_checkpointing=True))

    def test_of_a_capture_the_first_error_is_told(self, monkeypatch):
        record = self.recorder(monkeypatch).record

        def waits() -> PassOutput:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand how to search for it")

        with pytest.raises(ConfigError) as refused:
            record(waits)
        (line,) = str(refused.value).splitlines()
        assert line.startswith("train.cuda_graph: this model's passes cannot be captured")
        assert line.endswith("(CUDA error: operation not permitted when stream is capturing)")

    def test_a_lack_of_memory_stays_one(self, monkeypatch):
        record = self.recorder(monkeypatch).record

        def large() -> PassOutput:
            raise torch.OutOfMemoryError("CUDA out of memory")

        with pytest.raises(torch.OutOfMemoryError):
            record(large)

    def recorder(self, monkeypatch) -> CudaGraphs:
        """On a device whose captures cannot be ended once they have failed."""

        class Capture:
            def __init__(self, *_, **__) -> None: ...
            def __enter__(self) -> None: ...
            def __exit__(self, *error) -> None:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

        for name, value in {"graph": Capture, "CUDAGraph": object, "Stream": object}.items():
            monkeypatch.setattr(torch.cuda, name, value if name == "graph" else lambda *_: None)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
        return CudaGraphs(torch.device("cpu"))


@needs_gpu
class TestOnAGPU:
    @pytest.mark.parametrize("case", CASES)
    def test_a_run_is_the_launched_one(self, store, tmp_path, case):
        assert_the_same_run(run_of(store, **CASES[case]), tmp_path)

    def test_a_run_of_many_tokens_is_the_launched_one(self, store, tmp_path):
        """Of more than 3,072 tokens PyTorch sorts the embedding's."""
        assert_the_same_run(run_of(store, batch=BatchConfig(tokens=4096)), tmp_path)

    def test_resuming_changes_nothing(self, store, tmp_path):
        assert_resuming_changes_nothing(run_of(store, **CASES["dropout"]), tmp_path)

    def test_random_numbers_follow_the_seed_at_the_replay(self):
        device, ids = torch.device("cuda"), torch.arange(64).view(2, 32)
        model = tiny_model(vocab_size=64, dropout=0.5).build().to(device)
        launched = Launched(Replica(model), nullcontext, device, targets=64, passes=1)
        on_device = ids.to(device)
        captured = Captured(launched, on_device, on_device, model.parameters(), CudaGraphs(device), accumulates=False)

        def losses_of(passes: ForwardBackward, steps: list[int]) -> list[float]:
            found = []
            for step in steps:
                seed_step(0, step, 0)
                found.append(passes(ids, ids).loss.item())
                model.zero_grad(set_to_none=True)
            return found

        steps = [0, 1, 0, 2]
        found = losses_of(captured, steps)
        assert found[0] == found[2]
        assert len(set(found)) == 3
        assert found == losses_of(launched, steps)

    def test_sparse_gradients_become_dense_ones(self, store, tmp_path):
        """The norm is then a sum over more zeros: equal but for rounding."""
        run = run_of(store, model=tiny_model(ffns={"p": SPARSE}, pattern=["p"]))
        fit(run, tmp_path / "launched")
        fit(with_graph(run), tmp_path / "captured")
        assert losses(tmp_path / "captured") == pytest.approx(losses(tmp_path / "launched"), rel=1e-5)

    def test_a_model_that_waits_for_the_device_is_refused(self, store, tmp_path):
        """In a process of its own: a capture that failed leaves PyTorch's random numbers in disorder."""
        layer = {"kind": "token_choice", "experts": 4, "d_expert": 16, "capacity_factor": 1.0}
        settings = run_of(store).model_dump(mode="json")
        settings["model"] |= {"ffns": {"t": layer}, "pattern": ["t"]}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
        words = ("train.cuda_graph=true", f"out={tmp_path / 'run'}", "--quiet")
        result = call_in_a_fresh_process("train", tmp_path / "run.yaml", *words)
        assert result.code == 2
        assert "train.cuda_graph: this model's passes cannot be captured" in result.err
        assert "Traceback" not in result.err
        assert not (tmp_path / "run").exists()

    def test_compiled_blocks_are_captured(self, store, tmp_path):
        model = tiny_model(layers=1, ffns={"d": DenseConfig()}, pattern=["d"])
        run = run_of(store, model=model, train=TrainConfig(precision="float32", compile=True))
        fit(run, tmp_path / "launched")
        fit(with_graph(run), tmp_path / "captured")
        # The captured run compiles before the check of causality, for one shape; the other for several.
        assert losses(tmp_path / "captured") == pytest.approx(losses(tmp_path / "launched"), rel=1e-4)
