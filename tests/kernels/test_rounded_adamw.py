"""AdamW on bfloat16 weights against `torch.optim.AdamW`."""

import sys

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from myriad.kernels import rounded_adamw

MODULE = sys.modules["myriad.kernels.rounded_adamw"]
OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def start(weight: float, moments: float, size: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.full((size,), value, dtype=torch.bfloat16) for value in (weight, moments, moments))


def exact_step(state: tuple[Tensor, Tensor, Tensor], grad: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's, in float64."""
    weight = torch.nn.Parameter(state[0].double())
    theirs = torch.optim.AdamW([weight], **OPTIONS)
    theirs.state[weight] = {
        "step": torch.tensor(float(step - 1)),
        "exp_avg": state[1].double(),
        "exp_avg_sq": state[2].double(),
    }
    weight.grad = grad.double()
    theirs.step()
    return weight.detach(), theirs.state[weight]["exp_avg"], theirs.state[weight]["exp_avg_sq"]


@pytest.mark.parametrize("step", [1, 7])
def test_every_step_is_adamws_on_average_and_never_a_digit_away(step):
    size = 2**16
    state = start(1.0, 0.01, size)
    grad = torch.full((size,), 0.013)
    exact = exact_step(state, grad, step)
    nearest = [value.bfloat16().double() for value in exact]
    rounded_adamw(*state, grad, **OPTIONS, step=step, seed=3)
    for mine, theirs, lost in zip(state, exact, nearest, strict=True):
        digit = theirs.abs() * 2**-7
        assert ((mine.double() - theirs).abs() <= digit).all()
        assert mine.unique().numel() == 2
        error = (mine.double().mean() - theirs.mean()).abs()
        assert error < 5 * digit.mean() / 2 / size**0.5
        assert (lost - theirs).abs().mean() > 10 * error  # what rounding to the nearest would do every time


def test_steps_far_below_a_digit_add_up():
    state = start(1.0, 0.0, 2**12)
    for step in range(1, 51):
        rounded_adamw(*state, torch.ones(2**12), **OPTIONS | {"lr": 1e-4, "weight_decay": 0.0}, step=step, seed=0)
    assert state[0].double().mean().item() == pytest.approx(1 - 50e-4, abs=2e-4)


@pytest.mark.parametrize("decay", [0.95, 0.999])
def test_the_error_of_the_second_moment_stays_bounded(decay):
    """And so does that of what divides a step: half of it. Rounded to the nearest, the average would stand still."""
    size, generator = 2**12, torch.Generator().manual_seed(0)
    state, exact = start(1.0, 0.0, size), torch.zeros(size, dtype=torch.float64)
    options, errors = OPTIONS | {"betas": (0.9, decay)}, []
    for step in range(1, 301):
        grad = torch.randn(size, generator=generator)
        exact.lerp_(grad.double().square(), 1 - decay)
        rounded_adamw(*state, grad, **options, step=step, seed=0)
        errors.append((state[2].double() / exact - 1).square().mean().sqrt().item())
    assert max(errors[100:]) < 1.3 * 2**-8.8 / (1 - decay**2) ** 0.5
    assert abs((state[2].double() / exact - 1).mean().item()) < 3 * errors[-1] / size**0.5


def test_chunks_change_nothing_and_step_and_seed_change_the_bits(monkeypatch):
    grad = torch.randn(100, 7, generator=torch.Generator().manual_seed(0))

    def after(step: int, seed: int) -> Tensor:
        state = tuple(part.view(100, 7) for part in start(1.0, 0.1, 700))
        rounded_adamw(*state, grad, **OPTIONS, step=step, seed=seed)
        return torch.stack(state)

    whole = after(1, 0)
    assert torch.equal(after(1, 0), whole)
    assert not torch.equal(after(1, 1)[0], whole[0])
    monkeypatch.setattr(MODULE, "CHUNK", 64)
    assert torch.equal(after(1, 0), whole)


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is made in more than bfloat16."""

    found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype != torch.bfloat16:
            self.found = max(self.found, result.numel())
        return result


def test_no_wide_copy_of_a_large_tensor_is_held(monkeypatch):
    monkeypatch.setattr(MODULE, "CHUNK", 64)
    state = start(1.0, 0.1, 1000)
    with Largest() as largest:
        rounded_adamw(*state, torch.ones(1000, dtype=torch.bfloat16), **OPTIONS, step=1, seed=0)
    assert largest.found == 64


def test_other_tensors_are_refused():
    state = start(1.0, 0.1, 6)
    with pytest.raises(ValueError, match="contiguous and bfloat16"):
        rounded_adamw(state[0].float(), *state[1:], torch.ones(6), **OPTIONS, step=1, seed=0)
    with pytest.raises(ValueError, match="contiguous and bfloat16"):
        rounded_adamw(*(part.view(2, 3).T for part in state), torch.ones(3, 2), **OPTIONS, step=1, seed=0)
    with pytest.raises(ValueError, match=r"the weight's shape \(6,\)"):
        rounded_adamw(*state, torch.ones(2, 3), **OPTIONS, step=1, seed=0)
    with pytest.raises(ValueError, match=r"the weight's shape \(6,\)"):
        rounded_adamw(*state[:2], state[2][:5], torch.ones(6), **OPTIONS, step=1, seed=0)
