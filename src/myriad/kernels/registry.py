"""Which implementation of an op runs.

Every op has a `reference` in plain PyTorch; others are held to it. `auto` takes the implementation that
was registered as the preferred one for the tensor's device, else the reference. The choice is made at run
time and is never part of a saved model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from myriad.config import MyriadError, nearest


class KernelError(MyriadError):
    """A kernel was asked for that cannot run here; the text says why."""


class Implementation(NamedTuple):
    functions: Any
    devices: frozenset[str] | None
    """Device types that it runs on; None: all."""
    preferred: bool
    """Whether `auto` takes it before the reference."""


_implementations: dict[str, dict[str, Implementation]] = {}
_choice = "auto"


def register(op: str, name: str, functions: Any, *, devices: tuple[str, ...] | None = None) -> None:
    """Add an implementation of an op.

    Args:
        op: the op's name, such as `product_key`.
        name: `reference`, or the name of a faster form.
        functions: what `resolve` returns: the op's own NamedTuple of functions.
        devices: the device types that it is made for and preferred on; None for the reference.
    """
    kinds = None if devices is None else frozenset(devices)
    _implementations.setdefault(op, {})[name] = Implementation(functions, kinds, preferred=devices is not None)


def names() -> list[str]:
    """What `use` accepts."""
    return ["auto", *sorted({name for forms in _implementations.values() for name in forms})]


def current() -> str:
    """The present choice."""
    return _choice


def choices(device_type: str) -> dict[str, str]:
    """Op -> `implementation (reason)` for what runs on a device type; goes into a run's record.

    Raises:
        KernelError: the explicit choice cannot run there.
    """
    return {op: "{} ({})".format(*_pick(op, device_type)) for op in _implementations}


def select(name: str) -> None:
    """Choose the implementation for the whole process.

    Raises:
        KernelError: no op has an implementation of that name.
    """
    global _choice
    if name not in names():
        raise KernelError(f"kernels '{name}' are not available{nearest(name, names())} (known: {', '.join(names())})")
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


def resolve(op: str, device_type: str) -> Any:
    """The functions of the implementation that runs an op on a device type.

    Raises:
        KernelError: the explicit choice cannot run there.
    """
    name, _ = _pick(op, device_type)
    return _implementations[op][name].functions


def _pick(op: str, device_type: str) -> tuple[str, str]:
    forms = _implementations[op]
    if _choice == "auto":
        for name, form in forms.items():
            if form.preferred and form.devices is not None and device_type in form.devices:
                return name, f"preferred on {device_type}"
        return "reference", f"no faster form for {device_type}"
    if _choice not in forms:
        raise KernelError(f"{op} has no '{_choice}' form (known: {', '.join(forms)})")
    devices = forms[_choice].devices
    if devices is not None and device_type not in devices:
        raise KernelError(f"the '{_choice}' form of {op} runs on {', '.join(sorted(devices))}, not on {device_type}")
    return _choice, "asked for"
