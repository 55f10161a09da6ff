"""The Triton form of expert lookups against the reference, in values and all gradients."""

from typing import Any, NamedTuple

import pytest
import torch
import triton_form
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_form import assert_near, by_both, digits

from myriad.kernels import choices, expert_lookup, registry, use

form = triton_form.form
few = settings(deadline=None, max_examples=12)
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
"""Of the inputs and of the tables."""


class Problem(NamedTuple):
    x: Tensor
    ids: Tensor
    weights: Tensor
    down: Tensor
    up: Tensor
    gate: Tensor | None


def problem(
    tokens=5, active=6, experts=9, width=3, *, gated=False, x_dtype=torch.float32, dtype=torch.float32, seed=0
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()

    tables = [normal(experts, width, dtype=dtype, scale=width**-0.5) for _ in range(3)]
    return Problem(
        normal(tokens, width, dtype=x_dtype),
        torch.randint(experts, (tokens, active), generator=generator),
        normal(tokens, active, dtype=torch.float32),
        tables[0],
        tables[1],
        tables[2] if gated else None,
    )


def value_and_gradients(case: Problem, **options: Any) -> list[Tensor]:
    y = expert_lookup(*case, **options)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y, *torch.autograd.grad(y, [t for t in case if t is not None and t.requires_grad], upstream)]


def assert_equals_reference(case: Problem, **options: Any) -> None:
    mine, expected = by_both(lambda: value_and_gradients(case, **options))
    widest = max((case.x.dtype, case.down.dtype), key=digits)
    for one, other in zip(mine, expected, strict=True):
        assert_near(one, other, digits(widest))


@st.composite
def problems(draw) -> Problem:
    """Few experts, so that a token often has one of them twice; sometimes one alone, or no token."""
    sizes = {"tokens": (0, 6), "active": (1, 7), "experts": (1, 9), "width": (1, 40), "seed": (0, 2**32)}
    drawn = {name: draw(st.integers(*bounds)) for name, bounds in sizes.items()}
    x_dtype, dtype = draw(st.sampled_from(DTYPES))
    return problem(**drawn, gated=draw(st.booleans()), x_dtype=x_dtype, dtype=dtype)


@few
@given(problems(), st.sampled_from(["gelu", "relu", "silu", "none"]), st.booleans())
def test_equals_the_reference(case, activation, sparse):
    assert_equals_reference(case, activation=activation, sparse=sparse)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "none"])
def test_every_activation_gated_or_not(activation, gated):
    assert_equals_reference(problem(gated=gated), activation=activation)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("x_dtype", "dtype"), DTYPES)
def test_every_dtype_and_layout_of_gradients(x_dtype, dtype, sparse):
    assert_equals_reference(problem(experts=40, width=20, gated=True, x_dtype=x_dtype, dtype=dtype), sparse=sparse)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("sizes", [(0, 6, 9, 3), (1, 1, 1, 1), (1, 40, 9, 17), (3, 5, 9, 300), (3, 2, 500, 16)])
def test_sizes_at_the_edges(sizes, sparse):
    assert_equals_reference(problem(*sizes), sparse=sparse)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_an_expert_of_many_tokens_is_summed_in_pieces(share, sparse, monkeypatch):
    """With chunks of 8, one expert's 96 or 192 entries span many of them, and others' lie within one or across two."""
    monkeypatch.setattr(triton_form.module("segments"), "CHUNK", 8)
    case = problem(tokens=24, active=8, experts=30, width=5)
    hot = torch.rand(case.ids.shape, generator=torch.Generator().manual_seed(2)) < share
    assert_equals_reference(case._replace(ids=case.ids.masked_fill(hot, 7)), sparse=sparse)


@pytest.mark.parametrize("chunk", [2, 4, 64])
def test_pieces_and_whole_segments_make_the_same_gradient(chunk, monkeypatch):
    monkeypatch.setattr(triton_form.module("segments"), "CHUNK", chunk)
    for seed in range(4):
        assert_equals_reference(problem(tokens=7, active=3, experts=6, seed=seed), sparse=True)


@pytest.mark.parametrize(("programs", "row"), [(1024, 256), (1, 16)])
def test_block_sizes_do_not_matter(programs, row, monkeypatch):
    monkeypatch.setattr(triton_form.module("launch"), "PROGRAMS", programs)
    monkeypatch.setattr(triton_form.module("launch"), "ROW", row)
    assert_equals_reference(problem(tokens=3, active=10, width=70, gated=True))


@pytest.mark.parametrize("sparse", [False, True])
def test_is_bit_equal_from_run_to_run(sparse, monkeypatch):
    monkeypatch.setattr(triton_form.module("segments"), "CHUNK", 16)
    case = problem(tokens=30, active=8, experts=11, width=20)
    with use("triton"):
        first, again = (value_and_gradients(case, sparse=sparse) for _ in range(2))
    assert all(torch.equal(one.to_dense(), other.to_dense()) for one, other in zip(first, again, strict=True))


def test_sparse_gradients_are_coalesced_and_equal_dense_ones():
    case = problem(tokens=4, active=3, experts=50, gated=True)
    with use("triton"):
        sparse, dense = value_and_gradients(case, sparse=True), value_and_gradients(case, sparse=False)
    for mine, expected in zip(sparse[3:], dense[3:], strict=True):
        assert mine.is_coalesced()
        assert torch.equal(mine.indices()[0], case.ids.unique())
        assert torch.equal(mine.to_dense(), expected)


@pytest.mark.parametrize("sparse", [False, True])
def test_layout_of_the_inputs_does_not_matter(sparse):
    case = problem(gated=True)
    strided = Problem(*(tensor.detach().mT.contiguous().mT for tensor in case))
    for tensor in strided:
        assert not tensor.is_contiguous()
        tensor.requires_grad_(tensor.is_floating_point())
    assert_equals_reference(strided, sparse=sparse)


def test_a_nan_is_not_hidden():
    case = problem()
    x = case.x.detach().clone()
    x[2] = float("nan")
    with use("triton"):
        for activation in ("gelu", "relu", "silu", "none"):
            y = expert_lookup(x, *case[1:], activation=activation)
            assert y.isnan().any(dim=1).tolist() == [False, False, True, False, False]


def test_auto_never_interprets(monkeypatch):
    monkeypatch.setattr(registry, "FORMS", {"triton": registry.FORMS["triton"]})
    assert set(choices("cpu").values()) == {"reference (no faster form for cpu)"}
    with use("triton"):
        chosen = choices("cpu")
    assert chosen.pop("retrieved_lookup") == "reference (no triton form)"  # which is two ops that have one
    assert set(chosen.values()) == {"triton (asked for)"}
