"""Which implementation of an op runs.

Every op has a `reference` in plain PyTorch; the other forms are held to it. A form's ops live in one package,
which is imported when it is first needed, and where its library is installed. `auto` takes the form that is made
for the tensor's device and takes its dtype, else the reference. The choice is made at run time and is never part
of a saved model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from myriad.config import MyriadError, nearest


class KernelError(MyriadError):
    """A kernel was asked for that cannot run here; the text says why."""


class Form(NamedTuple):
    """A family of implementations, one for each op."""

    package: str
    """Its import registers the implementations."""
    library: str
    """What must be installed."""
    device: str
    """The device type that it is made for: `auto` takes it there."""


FORMS = {
    "numba": Form("myriad.kernels.cpu", "numba", "cpu"),
    "triton": Form("myriad.kernels.triton", "triton", "cuda"),
}


class Implementation(NamedTuple):
    functions: Any
    devices: frozenset[str] | None
    """Device types that it runs on; None: all."""
    dtypes: frozenset[torch.dtype] | None
    """Dtypes that it takes; None: all."""
    serves: frozenset[str] = frozenset()
    """Forms that lack the op on purpose: who asks for one of them gets this."""

    def refusal(self, device_type: str, dtype: torch.dtype) -> str | None:
        """Why it cannot run there, if it cannot."""
        if self.devices is not None and device_type not in self.devices:
            return f"runs on {' and '.join(sorted(self.devices))}, not on {device_type}"
        if self.dtypes is not None and dtype not in self.dtypes:
            known = " and ".join(sorted(_plain(known) for known in self.dtypes))
            return f"takes {known}, not {_plain(dtype)}"
        return None


_implementations: dict[str, dict[str, Implementation]] = {}
_loaded: set[str] = set()
_choice = "auto"


def register(
    op: str,
    name: str,
    functions: Any,
    *,
    devices: tuple[str, ...] | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
    serves: tuple[str, ...] = (),
) -> None:
    """Add an implementation of an op.

    Args:
        op: the op's name, such as `product_key`.
        name: `reference`, or the name of a form of `FORMS`.
        functions: what `resolve` returns: the op's own NamedTuple of functions.
        devices, dtypes: what it runs on and takes; None: all.
        serves: of a reference, the forms that lack the op on purpose: it runs where one of them is asked for.
    """
    _implementations.setdefault(op, {})[name] = Implementation(
        functions,
        None if devices is None else frozenset(devices),
        None if dtypes is None else frozenset(dtypes),
        frozenset(serves),
    )
    _chosen.cache_clear()


def names() -> list[str]:
    """What `use` accepts."""
    return ["auto", "reference", *FORMS]


def current() -> str:
    """The present choice."""
    return _choice


def choices(device_type: str, dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """Op -> `implementation (reason)` for what runs on a device type; goes into a run's record.

    Raises:
        KernelError: the explicit choice cannot run there.
    """
    return {op: "{} ({})".format(*_pick(op, device_type, dtype)) for op in _implementations}


def select(name: str) -> None:
    """Choose the implementation for the whole process.

    Raises:
        KernelError: there is none of that name, or its library is not installed.
    """
    global _choice
    if name not in names():
        raise KernelError(f"kernels '{name}' are not available{nearest(name, names())} (known: {', '.join(names())})")
    if name in FORMS and (missing := _missing(name)):
        raise KernelError(f"kernels '{name}' cannot run: {missing}")
    _choice = name


@contextmanager
def use(name: str) -> Iterator[None]:
    """Choose the implementation inside a `with` block, for every thread of the process."""
    before = _choice
    select(name)
    try:
        yield
    finally:
        select(before)


def resolve(op: str, device_type: str, dtype: torch.dtype) -> Any:
    """The functions of the implementation that runs an op on tensors of a device type and a dtype.

    Raises:
        KernelError: the explicit choice cannot run there.
    """
    return _chosen(_choice, op, device_type, dtype)


@cache
def _chosen(choice: str, op: str, device_type: str, dtype: torch.dtype) -> Any:
    """Remembered for each choice: to find it anew takes as long as a small kernel."""
    name, _ = _pick(op, device_type, dtype)
    return _implementations[op][name].functions


def computes_directly(*tensors: Tensor) -> bool:
    """Whether an op's function may be called without PyTorch's dispatcher, which takes as long as a small kernel.

    It may where nothing is to be recorded: no gradient, no graph, no mode such as a FLOP counter's, plain tensors.
    """
    return not torch.is_grad_enabled() and _plainly(tensors)


def differentiates_directly(*tensors: Tensor) -> bool:
    """Whether an op may be an `autograd.Function`, which costs half of what a custom op with a gradient does.

    It may where nothing but a gradient is to be recorded.
    """
    return torch.is_grad_enabled() and _plainly(tensors)


def _plainly(tensors: tuple[Tensor, ...]) -> bool:
    """Whether no graph is traced and no mode looks on, and the tensors are plain ones."""
    watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    return not watched and all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)


def _pick(op: str, device_type: str, dtype: torch.dtype) -> tuple[str, str]:
    if _choice == "auto":
        return _preferred(op, device_type, dtype)
    if _choice in FORMS:
        _load(_choice)
    form = _implementations[op].get(_choice)
    if form is None and _choice in _implementations[op]["reference"].serves:
        return "reference", f"no {_choice} form"
    if form is None:
        raise KernelError(f"{op} has no '{_choice}' form (known: {', '.join(_implementations[op])})")
    if refusal := form.refusal(device_type, dtype):
        raise KernelError(f"the '{_choice}' form of {op} {refusal}")
    return _choice, "asked for"


def _preferred(op: str, device_type: str, dtype: torch.dtype) -> tuple[str, str]:
    for name, form in FORMS.items():
        if form.device != device_type:
            continue
        if missing := _missing(name):
            return "reference", missing
        _load(name)
        implementation = _implementations[op].get(name)
        if implementation is None:
            return "reference", f"no {name} form"
        if refusal := implementation.refusal(device_type, dtype):
            return "reference", f"{name} {refusal}"
        return name, f"preferred on {device_type}"
    return "reference", f"no faster form for {device_type}"


@cache
def _missing(name: str) -> str | None:
    """What a form lacks here, if anything."""
    library = FORMS[name].library
    return None if find_spec(library) is not None else f"{library} is not installed"


def _load(name: str) -> None:
    if name not in _loaded:
        import_module(FORMS[name].package)
        _loaded.add(name)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
