"""Which implementation of an op runs, on a made-up op with made-up forms."""

import sys
import threading

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from myriad.config import MyriadError
from myriad.kernels import (
    batch_norm,
    choices,
    current,
    expert_lookup,
    lazy_adam,
    names,
    product_key,
    registry,
    retrieved_lookup,
    rounded_adamw,
    softmax_gradient,
    use,
    value_lookup,
)
from myriad.kernels.registry import Form, KernelError, computes_directly, register, resolve

FAST = """
from myriad.kernels.registry import register
import torch
register("fake", "fast", "functions for CUDA", devices=("cuda",), dtypes=(torch.float32, torch.bfloat16))
"""


@pytest.fixture(autouse=True)
def own_registry(monkeypatch, tmp_path):
    """Two forms of our own, in packages of their own; changes of the registry end with the test."""
    (tmp_path / "fast_forms.py").write_text(FAST)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fast_forms", raising=False)
    forms = {"fast": Form("fast_forms", "json", "cuda"), "absent": Form("no_forms", "no_such_library", "mps")}
    monkeypatch.setattr(registry, "FORMS", forms)
    monkeypatch.setattr(registry, "_implementations", {op: dict(f) for op, f in registry._implementations.items()})
    monkeypatch.setattr(registry, "_loaded", set())
    monkeypatch.setattr(registry, "_choice", "auto")
    forget()
    yield
    forget()


def forget() -> None:
    """What was found in one registry is not asked of another."""
    registry._missing.cache_clear()
    registry._chosen.cache_clear()


@pytest.fixture
def fake_op() -> str:
    """An op of which one form, for CUDA, is in a package that is not imported yet."""
    register("fake", "reference", "functions for all")
    return "fake"


def test_a_forms_package_is_imported_when_it_is_first_needed(fake_op):
    choices("cpu")
    assert "fast_forms" not in sys.modules
    choices("cuda")
    assert "fast_forms" in sys.modules


def test_a_form_whose_library_is_missing_is_passed_over_with_the_reason(fake_op):
    assert choices("mps")["fake"] == "reference (no_such_library is not installed)"
    with pytest.raises(KernelError, match="kernels 'absent' cannot run: no_such_library is not installed"):
        registry.select("absent")


def test_a_dtype_that_a_form_does_not_take_goes_to_the_reference(fake_op):
    assert resolve(fake_op, "cuda", torch.float64) == "functions for all"
    reason = "reference (fast takes bfloat16 and float32, not float64)"
    assert choices("cuda", torch.float64)["fake"] == reason
    with use("fast"), pytest.raises(KernelError, match="'fast' form of fake takes bfloat16 and float32, not float64"):
        resolve(fake_op, "cuda", torch.float64)


def test_an_op_without_a_form_goes_to_the_reference(fake_op):
    register("other", "reference", "functions")
    assert choices("cuda")["other"] == "reference (no fast form)"


def test_use_chooses_inside_its_block_and_restores():
    with use("reference"):
        assert current() == "reference"
        with use("auto"):
            assert current() == "auto"
        assert current() == "reference"
    assert current() == "auto"


def test_use_restores_after_an_error():
    with pytest.raises(ZeroDivisionError), use("reference"):
        raise ZeroDivisionError
    assert current() == "auto"


def test_use_holds_for_other_threads():
    seen = []
    with use("reference"):
        thread = threading.Thread(target=lambda: seen.append(current()))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_an_unknown_name_suggests_the_nearest_and_changes_nothing():
    with pytest.raises(KernelError, match=r"'refrence'.*did you mean 'reference'\?.*known: auto, "):
        registry.select("refrence")
    assert current() == "auto"
    assert issubclass(KernelError, MyriadError)
    assert KernelError.exit_code == 2


def test_names_are_auto_the_reference_and_every_form():
    assert names() == ["auto", "reference", "fast", "absent"]


def test_auto_prefers_the_devices_own_form_else_the_reference(fake_op):
    assert resolve(fake_op, "cuda", torch.float32) == "functions for CUDA"
    assert resolve(fake_op, "cpu", torch.float32) == "functions for all"
    assert resolve(fake_op, "mps", torch.float32) == "functions for all"


def test_the_reference_runs_anywhere_when_asked_for(fake_op):
    with use("reference"):
        assert resolve(fake_op, "cuda", torch.float32) == resolve(fake_op, "cpu", torch.float32) == "functions for all"


def test_a_form_for_other_devices_is_refused_with_the_reason(fake_op):
    with use("fast"):
        assert resolve(fake_op, "cuda", torch.float32) == "functions for CUDA"
        with pytest.raises(KernelError, match="'fast' form of fake runs on cuda, not on cpu"):
            resolve(fake_op, "cpu", torch.float32)


def test_a_form_that_an_op_lacks_is_refused(fake_op):
    register("other", "reference", "functions")
    with use("fast"), pytest.raises(KernelError, match=r"other has no 'fast' form \(known: reference\)"):
        resolve("other", "cuda", torch.float32)


def test_an_explicit_choice_that_cannot_run_stops_the_op(fake_op):
    with use("fast"), pytest.raises(KernelError, match="product_key has no 'fast' form"):
        product_key(torch.randn(1, 1, 2, 3), torch.randn(2, 4, 3), 1)


def test_choices_name_the_form_and_why(fake_op):
    assert choices("cuda")["fake"] == "fast (preferred on cuda)"
    assert choices("cpu")["fake"] == "reference (no faster form for cpu)"
    with use("reference"):
        assert set(choices("cpu").values()) == {"reference (asked for)"}


def test_choices_refuse_what_cannot_run(fake_op):
    with use("fast"), pytest.raises(KernelError):
        choices("cpu")


def test_every_op_runs_through_the_registry(monkeypatch):
    asked = []
    steps = ["table_update", "rounded_adamw"]
    ops = ["product_key", "expert_lookup", "value_lookup", *steps, "cross_entropy", "batch_norm", "retrieved_lookup"]
    for module in ops:
        path = f"myriad.kernels.{module}"
        monkeypatch.setattr(sys.modules[path], "resolve", lambda op, *what: (asked.append(op), resolve(op, *what))[1])
    table = torch.randn(4, 3)
    _, ids = product_key(torch.randn(2, 1, 2, 3), torch.randn(2, 2, 3), 1)
    expert_lookup(torch.randn(2, 3), ids.flatten(1), torch.ones(2, 1), table, table)
    value_lookup(ids.flatten(1), torch.ones(2, 1), table)
    moments = torch.zeros(4, 3), torch.zeros(4, 3)
    lazy_adam(table, *moments, torch.ones(4, 3), lr=0.1, betas=(0.9, 0.999), eps=1e-8, step=1)
    options = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "step": 1, "seed": 0}
    rounded_adamw(*(torch.zeros(4).bfloat16() for _ in range(3)), torch.ones(4), **options)
    softmax_gradient(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), 2)
    batch_norm(table, *torch.zeros(3, 3))
    with torch.no_grad():
        retrieved_lookup(torch.randn(1, 3), torch.randn(1, 1, 2, 3), torch.randn(2, 2, 3), 1, "softmax", table, table)
    assert asked == [*ops, "product_key", "expert_lookup"]  # what the last one's reference stands for


class TestComputesDirectly:
    """Ops are passed by only where PyTorch has nothing to record."""

    def test_only_without_gradients(self):
        x = torch.ones(2)
        assert not computes_directly(x)
        with torch.no_grad():
            assert computes_directly(x, torch.nn.Parameter(x))
        with torch.inference_mode():
            assert computes_directly(x)

    def test_not_of_tensors_of_another_kind(self):
        with FakeTensorMode():
            fake = torch.ones(2)
        with torch.no_grad():
            assert not computes_directly(fake)

    def test_modes_see_the_ops(self):
        queries, keys = torch.randn(3, 1, 2, 4), torch.randn(2, 5, 4)
        x, table = torch.randn(3, 4), torch.randn(25, 4)
        with torch.no_grad(), Seen() as seen:
            scores, ids = product_key(queries, keys, 2)
            expert_lookup(x, ids.flatten(1), scores.flatten(1), table, table)
            value_lookup(ids.flatten(1), scores.flatten(1), table)
            batch_norm(x, *torch.zeros(3, 4))
        lookups = {"myriad::product_key", "myriad::expert_lookup", "myriad::value_lookup"}
        assert lookups | {"myriad::batch_norm"} <= seen.names

    def test_values_are_those_of_the_ops(self):
        queries, keys = torch.randn(3, 1, 2, 4), torch.randn(2, 5, 4)
        with torch.no_grad():
            direct = product_key(queries, keys, 2)
            with Seen():
                through_ops = product_key(queries, keys, 2)
        assert all(map(torch.equal, direct, through_ops))


class Seen(TorchDispatchMode):
    """The names of the ops that the dispatcher saw."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name().split(".")[0])
        return func(*args, **(kwargs or {}))
