"""Looked-up single-neuron experts against einsums over gathered rows."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from myriad.kernels import expert_lookup
from myriad.kernels.table_gradient import dense_gradients, lone_gradients, sparse_gradient

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "none": lambda x: x}
quick = settings(deadline=None, max_examples=60)


class Problem(NamedTuple):
    x: Tensor
    ids: Tensor
    weights: Tensor
    down: Tensor
    up: Tensor
    gate: Tensor | None

    def differentiable(self) -> list[Tensor]:
        return [t for t in self if t is not None and t.requires_grad]


def problem(
    tokens=5, active=6, experts=9, width=3, *, gated=False, dtype=torch.float64, x_dtype=None, seed=0
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype=dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    return Problem(
        normal(tokens, width, dtype=x_dtype or dtype),
        torch.randint(experts, (tokens, active), generator=generator),
        normal(tokens, active),
        normal(experts, width),
        normal(experts, width),
        normal(experts, width) if gated else None,
    )


def naive(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    down: Tensor,
    up: Tensor,
    gate: Tensor | None,
    *,
    activation: str = "gelu",
) -> Tensor:
    act = ACTIVATIONS[activation]
    down_dots = torch.einsum("td,tad->ta", x, down[ids])
    hidden = act(down_dots) if gate is None else act(torch.einsum("td,tad->ta", x, gate[ids])) * down_dots
    return torch.einsum("ta,tad->td", weights * hidden, up[ids])


def value_and_gradients(function: Callable[..., Tensor], case: Problem, **options) -> list[Tensor]:
    y = function(*case, **options)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [y, *torch.autograd.grad(y, case.differentiable(), upstream.to(y.dtype))]


@st.composite
def problems(draw, dtype: torch.dtype) -> Problem:
    """Few experts, so that a token often has one of them twice; sometimes one alone, or no token."""
    sizes = {"tokens": (0, 6), "active": (1, 7), "experts": (1, 9), "width": (1, 5), "seed": (0, 2**32)}
    drawn = {name: draw(st.integers(*bounds)) for name, bounds in sizes.items()}
    return problem(**drawn, gated=draw(st.booleans()), dtype=dtype)


@quick
@given(problems(torch.float64), st.sampled_from(list(ACTIVATIONS)), st.booleans())
def test_equals_naive_in_outputs_and_all_gradients(case, activation, sparse):
    found = value_and_gradients(expert_lookup, case, activation=activation, sparse=sparse)
    for mine, expected in zip(found, value_and_gradients(naive, case, activation=activation), strict=True):
        assert_close(mine.to_dense(), expected)


@quick
@given(problems(torch.float32), st.sampled_from(list(ACTIVATIONS)))
def test_equals_naive_in_float32(case, activation):
    found = value_and_gradients(expert_lookup, case, activation=activation, sparse=False)
    for mine, expected in zip(found, value_and_gradients(naive, case, activation=activation), strict=True):
        assert_close(mine, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, gated):
    x, ids, *rest = problem(gated=gated)

    def apply(x, *rest):
        return expert_lookup(x, ids, *rest, activation=activation, sparse=False)

    assert torch.autograd.gradcheck(apply, (x, *rest))


def test_an_expert_that_stands_twice_counts_twice():
    case = problem(tokens=3, active=2)
    case = case._replace(ids=torch.full((3, 2), 4), weights=torch.ones(3, 2, dtype=torch.float64))
    once = expert_lookup(case.x, case.ids[:, :1], case.weights[:, :1], case.down, case.up)
    assert_close(expert_lookup(*case), 2 * once)


@pytest.mark.parametrize("gated", [False, True])
def test_sparse_gradients_are_coalesced_and_equal_dense_ones(gated):
    case = problem(tokens=4, active=3, experts=50, gated=gated)
    sparse = value_and_gradients(expert_lookup, case, sparse=True)
    dense = value_and_gradients(expert_lookup, case, sparse=False)
    for mine, expected in zip(sparse[:3], dense[:3], strict=True):
        assert torch.equal(mine, expected)
    assert len(sparse[3:]) == 2 + gated
    for mine, expected in zip(sparse[3:], dense[3:], strict=True):
        assert mine.layout == torch.sparse_coo
        assert mine.is_coalesced()
        assert torch.equal(mine.indices()[0], case.ids.unique())
        assert torch.equal(mine.to_dense(), expected)


@pytest.mark.parametrize(("experts", "layout"), [(23, torch.strided), (24, torch.sparse_coo)])
def test_gradients_are_sparse_where_a_batch_touches_at_most_half(experts, layout):
    case = problem(tokens=4, active=3, experts=experts)
    expert_lookup(*case).sum().backward()
    assert case.down.grad.layout == case.up.grad.layout == layout
    assert sparse_gradient(4, 3, experts) == (layout == torch.sparse_coo)


def test_gradients_are_dense_where_sizes_must_be_known():
    case = problem(tokens=4, active=3, experts=24)
    with dense_gradients():
        y = expert_lookup(*case)
    y.sum().backward()  # what the forward pass chose holds
    assert case.down.grad.layout == case.up.grad.layout == torch.strided
    assert sparse_gradient(4, 3, 24)


@pytest.mark.parametrize(("experts", "layout"), [(5, torch.strided), (6, torch.sparse_coo)])
def test_gradients_that_stand_alone_are_sparse_up_to_two_entries_a_row(experts, layout):
    case = problem(tokens=4, active=3, experts=experts)
    with lone_gradients(torch.device("cpu")):
        y = expert_lookup(*case)
    y.sum().backward()
    assert case.down.grad.layout == case.up.grad.layout == layout
    assert not sparse_gradient(4, 3, experts)


def test_gradients_that_stand_alone_change_nothing_elsewhere_and_where_sizes_must_be_known():
    with lone_gradients(torch.device("cuda")):
        assert not sparse_gradient(4, 3, 23)
        assert sparse_gradient(4, 3, 24)
    with dense_gradients(), lone_gradients(torch.device("cpu")):
        assert not sparse_gradient(4, 3, 24)


def test_without_gradients_sparse_changes_nothing():
    case = problem()
    with torch.no_grad():
        assert torch.equal(expert_lookup(*case, sparse=True), expert_lookup(*case, sparse=False))


def allocated(function: Callable[[], None]) -> tuple[int, int]:
    """The largest allocation and the peak of all, in bytes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return max(event.nbytes() for event in events), peak


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_nothing_of_tokens_x_active_x_width_is_held(sparse, gated):
    case = problem(tokens=256, active=32, experts=64, width=128, gated=gated, dtype=torch.float32)
    gathered = 256 * 32 * 128 * 4
    largest, peak = allocated(lambda: expert_lookup(*case, sparse=sparse).sum().backward())
    assert largest < gathered / 10
    assert peak < gathered / 2
    # The measure sees what it looks for.
    largest, peak = allocated(lambda: naive(*case).sum().backward())
    assert largest >= gathered
    assert peak >= 2 * gathered


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("bad", [-1, 9])
def test_an_id_outside_the_table_is_refused(bad, sparse):
    case = problem(experts=9)
    case.ids[3, 2] = bad
    with pytest.raises(IndexError, match=r"ids must lie between 0 and 8; found"):
        expert_lookup(*case, sparse=sparse)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.zeros(5, 1, 3)}, "expected x (T, D) and ids and weights (T, A), not (5, 1, 3)"),
        ({"x": torch.zeros(4, 3)}, "not (4, 3), (5, 6) and (5, 6)"),
        ({"weights": torch.zeros(5, 5)}, "not (5, 3), (5, 6) and (5, 5)"),
        ({"down": torch.zeros(9, 4)}, "every table must have shape (N, 3), not [(9, 4), (9, 3)]"),
        ({"up": torch.zeros(8, 3)}, "every table must have shape (N, 3), not [(9, 3), (8, 3)]"),
        ({"gate": torch.zeros(9)}, "every table must have shape (N, 3), not [(9, 3), (9, 3), (9,)]"),
    ],
)
def test_wrong_shapes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        expert_lookup(*problem()._replace(**wrong))


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match=r"unknown activation 'swish' \(known: gelu, relu, silu, none\)"):
        expert_lookup(*problem(), activation="swish")


@pytest.mark.parametrize("sparse", [False, True])
def test_is_bit_equal_from_run_to_run(sparse):
    case = problem(tokens=200, active=16, experts=30, width=40, gated=True, dtype=torch.float32)
    first = value_and_gradients(expert_lookup, case, sparse=sparse)
    for mine, again in zip(first, value_and_gradients(expert_lookup, case, sparse=sparse), strict=True):
        assert torch.equal(mine.to_dense(), again.to_dense())


def test_two_threads_at_once_get_the_values_of_one():
    cases = [problem(tokens=100, active=16, experts=64, width=32, seed=seed) for seed in range(8)]
    alone = [value_and_gradients(expert_lookup, case) for case in cases]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda case: value_and_gradients(expert_lookup, case), cases))
    for mine, expected in zip(together, alone, strict=True):
        assert all(map(torch.equal, mine, expected))


@pytest.mark.parametrize("sparse", [False, True])
def test_layout_of_the_inputs_does_not_matter(sparse):
    case = problem(gated=True)
    strided = Problem(*(tensor.detach().mT.contiguous().mT for tensor in case))
    for tensor in strided:
        assert not tensor.is_contiguous()
        tensor.requires_grad_(tensor.is_floating_point())
    found = value_and_gradients(expert_lookup, strided, sparse=sparse)
    for mine, expected in zip(found, value_and_gradients(naive, case), strict=True):
        assert_close(mine.to_dense(), expected)


@pytest.mark.parametrize("sparse", [False, True])
def test_bfloat16_activations_keep_float32_tables(sparse):
    case = problem(gated=True, dtype=torch.float32, x_dtype=torch.bfloat16)
    found = value_and_gradients(expert_lookup, case, sparse=sparse)
    exact = case._replace(x=case.x.detach().float().requires_grad_())
    assert [g.dtype for g in found] == [torch.bfloat16] * 2 + [torch.float32] * 4
    y = found[0]
    assert torch.equal(y, expert_lookup(*exact).bfloat16())
    for mine, expected in zip(found[1:], value_and_gradients(naive, exact)[1:], strict=True):
        # Inputs differ by the rounding of y's gradient to bfloat16 alone.
        assert_close(mine.to_dense().float(), expected, rtol=0.02, atol=0.05)


def test_bfloat16_tables_keep_their_dtype():
    case = problem(dtype=torch.bfloat16)
    found = value_and_gradients(expert_lookup, case, sparse=False)
    exact = Problem(*(t if t is None or not t.requires_grad else t.detach().double().requires_grad_() for t in case))
    for mine, expected in zip(found, value_and_gradients(naive, exact), strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - expected).norm() < 0.02 * expected.norm()


def test_autocast_leaves_tables_and_numbers_alone():
    case = problem(tokens=20, gated=True, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = expert_lookup(*case, sparse=False)
    assert torch.equal(inside, expert_lookup(*case, sparse=False))
    inside.sum().backward()
    assert case.down.grad.dtype == torch.float32


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [0, 5])
def test_the_ops_pass_pytorchs_check(tokens, gated):
    case = problem(tokens=tokens, gated=gated)
    torch.library.opcheck(torch.ops.myriad.expert_lookup, (*case, "gelu"))
    detached = [t if t is None else t.detach() for t in case]
    y, *dots = torch.ops.myriad.expert_lookup(*detached, "gelu")
    arguments = (torch.randn_like(y), *detached, *dots, "gelu")
    torch.library.opcheck(torch.ops.myriad.expert_lookup_backward, arguments)
