"""Grouped products against a loop over experts; rows there and back against sums written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from myriad.ffn.base import Cost
from myriad.ffn.experts import (
    Experts,
    add_rows,
    expert_width,
    experts_cost,
    group_by_expert,
    grouped_linear,
    in_product_dtype,
    mix,
    mix_batched,
    router_logits,
    rows_of,
    take_rows,
    takes_grouped,
)

ENDS = [3, 3, 4, 11]
"""Four experts of three, no, one and seven rows."""


def looped(x: Tensor, weights: Tensor) -> Tensor:
    return torch.cat([x[start:end] @ w.T for start, end, w in zip([0, *ENDS], ENDS, weights, strict=False)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 8), (5, 8), (16, 7), (3, 1)])
def test_a_grouped_product_is_a_product_for_each_expert(dtype, inputs, outputs):
    torch.manual_seed(0)
    x = torch.randn(ENDS[-1], inputs, dtype=dtype, requires_grad=True)
    weights = torch.randn(len(ENDS), outputs, inputs, dtype=dtype, requires_grad=True)
    upstream = torch.randn(ENDS[-1], outputs, dtype=dtype)
    found = grouped_linear(x, weights, torch.tensor(ENDS, dtype=torch.int32))
    expected = looped(x, weights)
    tolerance = {"rtol": 0.02, "atol": 0.05} if dtype == torch.bfloat16 else {}
    assert found.dtype == dtype
    assert found.is_contiguous()
    assert_close(found, expected, **tolerance)
    mine = torch.autograd.grad(found, [x, weights], upstream)
    theirs = torch.autograd.grad(expected, [x, weights], upstream)
    for grad, other in zip(mine, theirs, strict=True):
        assert_close(grad, other, **tolerance)
    assert not mine[1][1].any()  # the expert without rows


def test_pytorchs_own_grouped_product_is_used_where_it_is_there():
    assert takes_grouped("cpu", torch.float32) == hasattr(F, "grouped_mm")
    assert not takes_grouped("cpu", torch.float64)


def test_a_grouped_product_of_no_rows():
    x, weights = torch.randn(0, 8, requires_grad=True), torch.randn(3, 4, 8, requires_grad=True)
    y = grouped_linear(x, weights, torch.zeros(3, dtype=torch.int32))
    assert y.shape == (0, 4)
    y.sum().backward()
    assert x.grad.shape == (0, 8)
    assert not weights.grad.any()


def test_a_gradient_that_is_one_number_everywhere():
    """`sum().backward()` gives a gradient without strides of its own, which PyTorch's product refuses."""
    x, weights = torch.randn(6, 8, requires_grad=True), torch.randn(2, 4, 8)
    grouped_linear(x, weights, torch.tensor([2, 6], dtype=torch.int32)).sum().backward()
    expected = torch.cat((weights[0].sum(0).expand(2, -1), weights[1].sum(0).expand(4, -1)))
    assert_close(x.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_are_taken_and_added_up_again(dtype):
    torch.manual_seed(0)
    tokens = torch.tensor([4, 0, 0, 2, 4, 4])
    rows = rows_of(tokens, 5)
    x = torch.randn(5, 3, dtype=dtype, requires_grad=True)
    taken = take_rows(x, rows)
    assert torch.equal(taken, x[tokens])
    added = add_rows(taken, rows)
    assert_close(added, x * torch.tensor([2.0, 0, 1, 0, 3], dtype=dtype).unsqueeze(1))
    added.sum().backward()
    assert_close(x.grad, torch.tensor([2.0, 0, 1, 0, 3], dtype=dtype).unsqueeze(1).expand(5, 3))


def test_gradients_of_rows():
    rows = rows_of(torch.tensor([2, 0, 2]), 3)
    x, y = (torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x: take_rows(x, rows), x)
    assert torch.autograd.gradcheck(lambda y: add_rows(y, rows), y)


def test_pairs_are_grouped_by_expert_and_by_token_within():
    ids = torch.tensor([[2, 0], [0, 1], [2, 0]])
    pairs, ends = group_by_expert(ids, 4)
    assert pairs.tolist() == [1, 2, 5, 3, 0, 4]
    assert ends.tolist() == [3, 4, 6, 6]
    assert ends.dtype == torch.int32


def test_pairs_without_an_expert_are_left_out():
    ids = torch.tensor([[3, 0], [3, 1], [3, 3]])
    pairs, ends = group_by_expert(ids, 3, complete=False)
    assert pairs.tolist() == [1, 3]
    assert ends.tolist() == [1, 2, 2]


@pytest.mark.parametrize("activation", ["gelu", "relu", "swiglu"])
def test_a_mixture_is_the_weighted_sum_over_experts(activation):
    torch.manual_seed(0)
    experts = Experts(3, 6, 5, activation).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    ids = torch.tensor([[0, 2], [1, 0], [3, 3], [2, 3]])  # 3 is none
    weights = torch.rand(4, 2, dtype=torch.float64) * (ids < 3)

    def expert(e: int, x: Tensor) -> Tensor:
        hidden = experts.up[e] @ x
        if activation == "swiglu":
            hidden = F.silu(experts.gate[e] @ x) * hidden
        else:
            hidden = {"gelu": F.gelu, "relu": F.relu}[activation](hidden)
        return experts.down[e] @ hidden

    expected = torch.stack(
        [
            sum((w * expert(int(e), x[t]) for w, e in zip(weights[t], ids[t], strict=True) if e < 3), x.new_zeros(6))
            for t in range(4)
        ]
    )
    assert_close(mix(experts, x, ids, weights, complete=False), expected)
    compiled = torch.compile(mix, backend="aot_eager", fullgraph=True)
    assert_close(compiled(experts, x, ids, weights, complete=False), expected)


def test_batched_and_grouped_products_agree():
    torch.manual_seed(0)
    experts = Experts(3, 6, 5, "swiglu").double()
    x = torch.randn(4, 6, dtype=torch.float64)
    tokens = torch.tensor([[0, 1], [3, 0], [1, 3]])
    weights = torch.rand(3, 2, dtype=torch.float64)
    ids = torch.tensor([[0, 1, 3], [0, 2, 3], [3, 3, 3], [1, 2, 3]])
    weights_by_token = torch.zeros(4, 3, dtype=torch.float64)
    for e, pair in enumerate(tokens.tolist()):
        for place, t in enumerate(pair):
            weights_by_token[t, ids[t].tolist().index(e)] = weights[e, place]
    assert_close(mix_batched(experts, x, tokens, weights), mix(experts, x, ids, weights_by_token, complete=False))


def test_scores_are_float32_under_autocast_and_products_are_not():
    x, weight = torch.randn(4, 8), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        logits = router_logits(x, weight)
        assert in_product_dtype(x).dtype == torch.bfloat16
        assert in_product_dtype(x.double()).dtype == torch.float64
    assert torch.equal(logits, F.linear(x, weight))
    assert in_product_dtype(x).dtype == torch.float32
    assert router_logits(x.bfloat16(), weight.bfloat16()).dtype == torch.float32


def test_widths_and_costs():
    assert expert_width(7, 96, 2, "gelu") == 7
    assert expert_width(None, 96, 2, "gelu") == 192
    assert expert_width(None, 96, 2, "swiglu") == 128
    cost = experts_cost(8, 2, 10, 5, "swiglu")
    assert cost == Cost.of_matrix(10, 8).as_routing() + Cost(8 * 150, 300, 600, 1200)
