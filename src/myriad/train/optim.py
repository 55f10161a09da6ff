"""Parameters optimised by their roles: matrices and vectors by AdamW, tables by lazy Adam.

A table's rows and moments move only where a row was used, so a step costs what its active experts cost. Parameters in
bfloat16 have moments in bfloat16, and are rounded stochastically.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor, nn
from torch.optim.adamw import adamw

from myriad.config import Config, ConfigError, nearest
from myriad.ffn import Role
from myriad.kernels import lazy_adam, new_moments, rounded_adamw
from myriad.kernels.pages import in_large_pages
from myriad.kernels.table_gradient import coalesced

Schedule = Literal["cosine", "wsd", "constant"]
Decay = Annotated[float, Field(ge=0, lt=1)]
Weights = Literal["float32", "bfloat16"]
FIRST_SEED: dict[Role, int] = {"table": 0, "matrix": 2**29, "vector": 2**30}
"""Of the stochastic rounding, by the place of a parameter among those of its role: no two have one."""
FUSED = ("cpu", "cuda")
"""Device types on which PyTorch's AdamW takes all parameters at once; its default is a loop over them."""


class OptimConfig(Config):
    """The optimizer and the course of its learning rates."""

    lr: float = Field(default=2e-3, gt=0)
    """Peak learning rate of matrices and vectors."""
    table_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of tables; None: `lr`."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay of the first and second moments."""
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled decay of matrices."""
    clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of all gradients together; None: any."""
    schedule: Schedule = "cosine"
    """`cosine` to final_lr, `wsd` (constant, then linear over the last `decay` of the steps), or `constant`."""
    warmup: NonNegativeInt = 100
    """Steps over which the learning rates rise from zero."""
    final_lr: float = Field(default=0.1, ge=0, le=1)
    """What remains of the learning rates at the end, as a share of the peak."""
    decay: float = Field(default=0.2, gt=0, le=1)
    """Share of the steps over which `wsd` decays."""
    frozen: list[str] = []
    """Parameters that stay as they are: their names, or what their names begin with, such as `trunk` or `experts.3`."""
    weights: Weights = "float32"
    """What parameters, gradients and moments are held in. `bfloat16` takes half the memory: updates are rounded
    stochastically, and products are made in it, too."""

    def scale(self, step: int, steps: int) -> float:
        """The learning rates' share of their peak at a step, counted from 0, of a number of steps."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, steps - self.warmup))
        if self.schedule == "cosine":
            return self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
        if self.schedule == "wsd":
            left = min(1.0, (steps - step) / max(1.0, self.decay * steps))
            return self.final_lr + (1 - self.final_lr) * left
        return 1.0


class HasRoles(Protocol):
    """A layer or a model: it knows its parameters' roles."""

    def roles(self) -> dict[str, Role]: ...
    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]: ...


class RoleOptimizer(torch.optim.Optimizer):
    """AdamW for matrices and vectors, lazy Adam for tables; a group for each role.

    Each group has `role`, `lr`, `betas`, `eps`, `weight_decay` and `peak_lr`, of which `lr` is a share that
    `scale_lr` sets. The moments are made when a parameter first has a gradient.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, defaults={})

    def scale_lr(self, share: float) -> None:
        """Set every group's learning rate to a share of its peak."""
        for group in self.param_groups:
            group["lr"] = share * group["peak_lr"]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["role"] == "table":
                self._step_tables(group)
            else:
                self._step_dense(group)
        return loss

    def _step_dense(self, group: dict[str, Any]) -> None:
        exact: list[Tensor] = []
        for number, parameter in enumerate(group["params"]):
            if parameter.grad is None:
                continue
            if not self.state[parameter]:
                moments = torch.zeros_like(parameter), torch.zeros_like(parameter)
                self.state[parameter] = _state(_steps_taken(0, parameter, group["role"]), *moments)
            if parameter.dtype == torch.bfloat16:
                self._step_rounded(group, parameter, FIRST_SEED[group["role"]] + number)
            else:
                exact.append(parameter)
        if exact:
            self._step_exact(group, exact)

    def _step_rounded(self, group: dict[str, Any], parameter: Tensor, seed: int) -> None:
        state = self.state[parameter]
        state["step"] += 1
        assert parameter.grad is not None
        rounded_adamw(
            parameter,
            state["exp_avg"],
            state["exp_avg_sq"],
            parameter.grad,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=int(state["step"]),
            seed=seed,
        )

    def _step_exact(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            fused=parameters[0].device.type in FUSED,
        )

    def _step_tables(self, group: dict[str, Any]) -> None:
        for number, table in enumerate(group["params"]):
            if table.grad is None:
                continue
            if not self.state[table]:
                self.state[table] = _state(_steps_taken(0, table, group["role"]), *new_moments(table))
            state = self.state[table]
            state["step"] += 1
            lazy_adam(
                table,
                state["exp_avg"],
                state["exp_avg_sq"],
                table.grad,
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                step=int(state["step"]),
                seed=FIRST_SEED["table"] + number,
            )


def _state(step: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> dict[str, Tensor]:
    return {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def _steps_taken(count: float, parameter: Tensor, role: Role | None) -> Tensor:
    """A parameter's number of steps, where its update reads it without waiting for a device.

    PyTorch's fused AdamW reads it on the device; ours, of tables and of rounded parameters, in Python.
    """
    by_pytorch = role != "table" and parameter.dtype != torch.bfloat16
    device = parameter.device if by_pytorch and parameter.device.type in FUSED else "cpu"
    return torch.full((), float(count), dtype=torch.float32, device=device)


def freeze(module: nn.Module, prefixes: Iterable[str]) -> None:
    """Let parameters have no gradient: those of the names, and those inside the modules of the names.

    Raises:
        ConfigError: a name that begins no parameter's, or nothing left to train.
    """
    names = dict(module.named_parameters())
    for prefix in prefixes:
        inside = [name for name in names if f"{name}.".startswith(f"{prefix}.")]
        if not inside:
            known = dict.fromkeys(name.split(".")[0] for name in names)
            hint = nearest(prefix, [*known, *names])
            raise ConfigError(
                f"optim.frozen: no parameter's name begins with '{prefix}'{hint} (known: {', '.join(known)})"
            )
        for name in inside:
            names[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in names.values()):
        raise ConfigError("optim.frozen: leaves no parameter to train")


def hold_weights(model: nn.Module, dtype: Weights) -> None:
    """Let a model's parameters be of a dtype, one after the other; buffers (running statistics) stay as they are.

    Vectors, too, though they take next to nothing: PyTorch has no fused norms for two dtypes, and the folder of a
    model of one dtype opens everywhere.
    """
    if dtype == "bfloat16":
        for parameter in model.parameters():
            narrow = torch.empty_like(parameter.data, dtype=torch.bfloat16)
            parameter.data = in_large_pages(narrow).copy_(parameter.data)


def build_optimizer(
    module: HasRoles,
    lr: float = 2e-3,
    table_lr: float | None = None,
    *,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> RoleOptimizer:
    """The optimizer of what is not frozen of a whole model or of one layer.

    Args:
        module: anything with `roles()` and `named_parameters()`.
        lr: learning rate of matrices and vectors.
        table_lr: learning rate of tables; None: `lr`.
        betas, eps: of every role.
        weight_decay: of matrices only.
    """
    by_role: dict[Role, list[nn.Parameter]] = {"matrix": [], "vector": [], "table": []}
    roles = module.roles()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            by_role[roles[name]].append(parameter)
    groups = []
    for role, parameters in by_role.items():
        rate = table_lr if role == "table" and table_lr is not None else lr
        decay = weight_decay if role == "matrix" else 0.0
        group = {"params": parameters, "role": role, "lr": rate, "peak_lr": rate}
        groups.append(group | {"betas": tuple(betas), "eps": eps, "weight_decay": decay})
    return RoleOptimizer([group for group in groups if group["params"]])


def clip_gradients(parameters: Iterable[Tensor], largest: float | None) -> Tensor:
    """Scale all gradients, dense ones and sparse rows together, to a norm of at most `largest`.

    Returns:
        the norm before, a float32 scalar; gradients stay as they are if it is not finite.
    """
    values = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.layout == torch.sparse_coo:
            parameter.grad = coalesced(parameter.grad)
            values.append(parameter.grad.values())
        else:
            values.append(parameter.grad)
    if not values:
        return torch.zeros(())
    norm = _total_norm(values)
    if largest is not None and bool(norm.isfinite() & (norm > largest)):
        share = largest / (norm + 1e-6)
        for value in values:
            value.mul_(share)
    return norm


def _total_norm(values: list[Tensor]) -> Tensor:
    """Of all together, in float32. On a CPU by dot products, which read at the memory's rate as its norms do not."""
    if all(value.device.type == "cpu" and value.dtype == torch.float32 for value in values):
        flat = (value.reshape(-1) for value in values)
        return torch.stack([torch.dot(value, value) for value in flat]).sum().sqrt()
    return torch.nn.utils.get_total_norm(values, error_if_nonfinite=False).float()


class NamedState(NamedTuple):
    """An optimizer's moments by parameter name, and the steps each has taken."""

    tensors: dict[str, Tensor]
    steps: dict[str, int]


def optimizer_state(optimizer: RoleOptimizer, names: Mapping[Tensor, str]) -> NamedState:
    """Everything that the optimizer remembers, by `exp_avg.NAME` and `exp_avg_sq.NAME`."""
    tensors: dict[str, Tensor] = {}
    steps: dict[str, int] = {}
    for parameter, state in optimizer.state.items():
        name = names[parameter]
        steps[name] = int(state["step"])
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{name}"] = state[moment]
    return NamedState(tensors, steps)


def restore_optimizer(optimizer: RoleOptimizer, names: Mapping[Tensor, str], saved: NamedState) -> None:
    """Give an optimizer back what `optimizer_state` returned."""
    roles = {parameter: group["role"] for group in optimizer.param_groups for parameter in group["params"]}
    for parameter, name in names.items():
        if name in saved.steps:
            step = _steps_taken(saved.steps[name], parameter, roles.get(parameter))
            moments = (saved.tensors[f"{moment}.{name}"] for moment in ("exp_avg", "exp_avg_sq"))
            optimizer.state[parameter] = _state(step, *moments)
