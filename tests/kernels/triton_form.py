"""The Triton form for tests, in Triton's interpreter on the CPU: a test file takes it by `form = triton_form.form`.

Kernels as they run on a GPU are in `test_triton_gpu.py`, and `test_triton_compiles.py` compiles them without one.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from myriad.kernels import registry

triton = pytest.importorskip("triton")

PACKAGE = "myriad.kernels.triton"


@pytest.fixture(scope="module", autouse=True)
def form() -> Iterator[None]:
    """Import the form anew, interpreted; afterwards all is as it was."""
    with pytest.MonkeyPatch.context() as patch, language_kept():
        interpret_kernels(patch)
        with fresh_package(patch):
            # Few programs with large blocks: the interpreter is slow for each.
            patch.setattr(module("launch"), "PROGRAMS", 1)
            yield


class fresh_package:
    """The package imported anew, and registered, inside a `with` block."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        forms = {op: dict(forms) for op, forms in registry._implementations.items()}
        patch.setattr(registry, "_implementations", forms)
        patch.setattr(registry, "_loaded", registry._loaded | {"triton"})
        self.before: dict[str, Any] = {}

    def __enter__(self) -> None:
        self.before = self._take_out()
        import_module(PACKAGE)

    def __exit__(self, *_: object) -> None:
        self._take_out()
        sys.modules.update(self.before)

    def _take_out(self) -> dict[str, Any]:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(PACKAGE)}


def interpret_kernels(patch: pytest.MonkeyPatch) -> None:
    """Have Triton interpret kernels that are defined from now on, and its own functions, defined before.

    Triton settles whether a function is compiled or interpreted when it is defined, and another test may have
    imported Triton already.
    """
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())  # Triton 3.6's fails on NumPy 2.4

    patch.setattr(interpreter, "_patch_lang_tensor", patch_tensor_and_index)
    patch.setattr(triton.knobs.runtime, "interpret", True)
    for library in (triton.language, triton.language.standard):
        for name, member in list(vars(library).items()):
            if isinstance(member, JITFunction):
                patch.setattr(library, name, interpreter.InterpretedFunction(member.fn))


@contextmanager
def language_kept() -> Iterator[None]:
    """Undo what the interpreter does to Triton's language, and leaves behind: nothing would compile afterwards."""
    language = triton.language
    core = language.core
    spaces = [language, core, language.math, core.tensor, core.dtype, core.tensor_descriptor_base]
    before = [dict(vars(space)) for space in spaces]
    yield
    for space, members in zip(spaces, before, strict=True):
        for name, member in list(vars(space).items()):
            if name not in members:
                delattr(space, name)
            elif member is not members[name]:
                setattr(space, name, members[name])


def module(name: str) -> Any:
    """One of the form's modules."""
    return import_module(f"{PACKAGE}.{name}")


def by_both(function: Callable[[], Any]) -> tuple[Any, Any]:
    """What a function returns with the Triton form, and with the reference."""
    with registry.use("triton"):
        mine = function()
    with registry.use("reference"):
        return mine, function()


def assert_near(mine: Tensor, expected: Tensor, share: float) -> None:
    """Two tensors of one dtype, shape and layout, apart by no more than a share of their norm.

    Sums of numbers of order one may cancel, so that their last digits are all that is left: 1e-5 a number is free.
    """
    assert (mine.dtype, mine.shape, mine.layout) == (expected.dtype, expected.shape, expected.layout)
    mine, expected = mine.to_dense().double(), expected.to_dense().double()
    assert (mine - expected).norm() <= share * expected.norm() + 1e-5 * mine.numel() ** 0.5


def digits(dtype: torch.dtype) -> float:
    """How far apart sums of one dtype may lie that are taken in two orders."""
    return 1e-2 if dtype == torch.bfloat16 else 2e-6
