"""The Triton form of AdamW on bfloat16 weights against the reference."""

import pytest
import torch
import triton_form
from torch import Tensor
from torch.testing import assert_close
from triton_form import by_both

from myriad.kernels import choices, rounded_adamw, use

form = triton_form.form
OPTIONS = {"lr": 0.03, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "seed": 2**31 - 5}
State = tuple[Tensor, Tensor, Tensor]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def start(*shape: int) -> State:
    return random(*shape, seed=0), torch.zeros(shape).bfloat16(), torch.zeros(shape).bfloat16()


def after(steps: int, *shape: int, dtype: torch.dtype = torch.bfloat16, **options: object) -> State:
    state = start(*shape)
    for step in range(1, steps + 1):
        rounded_adamw(*state, random(*shape, seed=step, dtype=dtype), **OPTIONS | options, step=step)
    return state


def assert_equals_reference(mine: State, expected: State) -> None:
    """The CPU's `lerp` rounds once where the interpreter rounds twice: few numbers lie so near the edge that they tip.

    One that tips moves by a digit of bfloat16, which later steps may leave beside a smaller number.
    """
    for one, other in zip(mine, expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert_close(one, other, rtol=2**-7, atol=2e-3)
        assert (one != other).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1,), (7, 3), (1024,), (5, 1024), (3001,)], ids=str)
def test_equals_the_reference(shape, dtype):
    assert_equals_reference(*by_both(lambda: after(1, *shape, dtype=dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stays_with_the_reference_over_steps(dtype):
    assert_equals_reference(*by_both(lambda: after(5, 37, 111, dtype=dtype)))


def test_is_the_reference_bit_for_bit_where_no_product_is_rounded():
    """Halves of small whole numbers: averages are exact, and all that is left are roots, quotients and random bits."""

    def halves(seed: int) -> Tensor:
        return torch.randint(-64, 64, (4000,), generator=torch.Generator().manual_seed(seed)) / 16

    def moved() -> State:
        state = halves(0).bfloat16(), halves(1).bfloat16(), halves(2).abs().bfloat16()
        rounded_adamw(*state, halves(3), **OPTIONS | {"betas": (0.5, 0.75), "weight_decay": 0.0}, step=3)
        return state

    mine, expected = by_both(moved)
    assert all(map(torch.equal, mine, expected))
    assert not torch.equal(mine[0], halves(0).bfloat16())


def test_large_shares_move_from_the_nearer_end_as_lerp_does():
    assert_equals_reference(*by_both(lambda: after(3, 2000, betas=(0.0, 0.3))))


def test_nothing_is_done_for_an_empty_tensor():
    with use("triton"):
        assert [part.numel() for part in after(1, 0, 5)] == [0, 0, 0]


def test_a_gradient_may_lie_in_any_order():
    with use("triton"):
        (state, other), grad = (start(30, 50) for _ in range(2)), random(50, 30, seed=1)
        rounded_adamw(*state, grad.T, **OPTIONS, step=1)
        rounded_adamw(*other, grad.T.contiguous(), **OPTIONS, step=1)
    assert all(map(torch.equal, state, other))


def test_numbers_that_are_not_finite_stay_what_they_are():
    def moved() -> State:
        state = torch.tensor([float("inf"), -float("inf"), float("nan"), 1.0]).bfloat16(), *start(4)[1:]
        rounded_adamw(*state, torch.tensor([1.0, 1.0, 1.0, float("nan")]), **OPTIONS, step=1)
        return state

    mine, expected = by_both(moved)
    assert_close(mine, expected, rtol=0, atol=0, equal_nan=True)


def test_step_and_seed_change_the_bits_and_nothing_else_does():
    with use("triton"):
        whole = after(2, 700)
        assert all(map(torch.equal, after(2, 700), whole))
        assert not torch.equal(after(2, 700, seed=1)[0], whole[0])


def test_no_number_beside_a_tensor_is_touched():
    """Neither in the last block, which is not whole, nor in the one after it."""
    rooms = [torch.full((3000,), 7.0).bfloat16() for _ in range(3)]
    with use("triton"):
        rounded_adamw(*(room[8:1500] for room in rooms), torch.ones(1492), **OPTIONS, step=1)
    for room in rooms:
        assert (room[:8] == 7).all()
        assert (room[1500:] == 7).all()
        assert (room[8:1500] != 7).any()


def test_auto_takes_the_reference_on_a_cpu():
    assert choices("cpu", torch.bfloat16)["rounded_adamw"] == "reference (no numba form)"
