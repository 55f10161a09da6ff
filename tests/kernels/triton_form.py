"""The Triton form for tests: compiled where there is a GPU, else in Triton's interpreter on the CPU."""

import sys
from collections.abc import Iterator
from importlib import import_module

import pytest
import torch

from myriad.kernels import registry

triton = pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACKAGE = "myriad.kernels.triton"


@pytest.fixture(scope="module", autouse=True)
def triton_form() -> Iterator[None]:
    """Import the form anew, interpreted where there is no GPU; afterwards the registry is what it was."""
    if DEVICE == "cuda":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        interpret_kernels(patch)
        patch.setattr(registry, "_implementations", {op: dict(f) for op, f in registry._implementations.items()})
        patch.setattr(registry, "_loaded", registry._loaded | {"triton"})
        for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
            patch.delitem(sys.modules, name)
        import_module(PACKAGE)
        yield
        for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
            del sys.modules[name]


def interpret_kernels(patch: pytest.MonkeyPatch) -> None:
    """Have Triton interpret kernels that are defined from now on, and what its own library defined before.

    Triton settles whether a function is compiled or interpreted when it is defined, and another test may have
    imported Triton already.
    """
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    patch.setattr(triton.knobs.runtime, "interpret", True)
    for module in (triton.language, triton.language.standard):
        for name, member in list(vars(module).items()):
            if isinstance(member, JITFunction):
                patch.setattr(module, name, InterpretedFunction(member.fn))


def compiled_beside(function, *arguments, **options):
    """The function's results by the Triton form and by the reference."""
    results = []
    for name in ("triton", "reference"):
        with registry.use(name):
            results.append(function(*arguments, **options))
    return results
