"""The reference of batch normalization against PyTorch's own, its moments, and the op in graphs and under modes."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

from myriad.kernels import batch_norm, use

Case = tuple[Tensor, Tensor, Tensor, Tensor]
EPS = 1e-5


def problem(tokens=7, features=4, dtype=torch.float64, weight_dtype=torch.float64, seed=0) -> Case:
    """Tokens, weight, bias and center; all but the center with a gradient."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(tokens, features, generator=generator, dtype=torch.float64) + 1
    weight, bias, center = torch.randn(3, features, generator=generator, dtype=torch.float64).unbind()
    weight, bias, center = (vector.to(weight_dtype) for vector in (weight, bias, center))
    return x.to(dtype).requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), center


def value_and_gradients(case: Case, upstream: Tensor) -> list[Tensor]:
    y, moments = batch_norm(*case, EPS)
    return [y, moments, *torch.autograd.grad(y, case[:3], upstream.to(y.dtype))]


@pytest.mark.parametrize("tokens", [1, 2, 50])
def test_is_pytorchs(tokens):
    case = x, weight, bias, _ = problem(tokens)
    upstream = torch.randn(tokens, 4, dtype=torch.float64)
    y, _, *found = value_and_gradients(case, upstream)
    # Of one token PyTorch's function refuses to normalise; its formula needs no exception.
    var, mean = torch.var_mean(x, 0, correction=0)
    expected = (x - mean) / (var + EPS).sqrt() * weight + bias
    if tokens > 1:
        assert_close(F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS), expected)
    assert_close(y, expected)
    assert_close(found, list(torch.autograd.grad(expected, (x, weight, bias), upstream)))


def test_gradcheck():
    x, weight, bias, center = problem()
    inputs = x, weight, bias
    assert torch.autograd.gradcheck(lambda x, weight, bias: batch_norm(x, weight, bias, center, EPS)[0], inputs)


def test_moments_are_sums_around_the_center():
    x, weight, bias, center = problem()
    _, moments = batch_norm(x, weight, bias, center, EPS)
    away = x.detach() - center
    assert_close(moments, torch.stack((torch.full_like(center, 7), away.sum(0), away.square().sum(0))))
    assert not moments.requires_grad


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_bit_for_bit_pytorchs_own_pass(dtype, weight_dtype):
    """What a CPU computes: runs of older versions go on with the same numbers."""
    case = x, weight, bias, _ = problem(100, 33, dtype, weight_dtype)
    upstream = torch.randn(100, 33, dtype=torch.float64)
    y, moments, *found = value_and_gradients(case, upstream)
    expected, *_ = torch.native_batch_norm(x, weight.float(), bias.float(), None, None, True, 0.0, EPS)
    assert (y.dtype, moments.dtype) == (dtype, torch.float32)
    assert torch.equal(y, expected)
    theirs = torch.autograd.grad(expected, (x, weight, bias), upstream.to(dtype))
    assert all(map(torch.equal, found, theirs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_modes_and_calls_without_gradients_give_the_same(dtype):
    case = problem(dtype=dtype, weight_dtype=dtype)
    y, moments = batch_norm(*case, EPS)
    with torch.no_grad():
        assert all(map(torch.equal, batch_norm(*case, EPS), (y, moments)))
    through_op = torch.ops.myriad.batch_norm(*case, EPS)
    assert all(map(torch.equal, through_op[:2], (y, moments)))
    assert [output.requires_grad for output in through_op] == [True, False, False, False]
    upstream = torch.randn_like(y)
    found = (torch.autograd.grad(each, case[:3], upstream) for each in (through_op[0], y))
    assert all(map(torch.equal, *found))


def test_the_moments_alone_need_no_gradient():
    x, weight, bias, center = problem()
    y, moments = batch_norm(x, weight, bias, center, EPS)
    (y.sum() + moments.sum()).backward()
    assert_close(bias.grad, torch.full_like(bias, 7))


def test_columns_that_lie_side_by_side():
    x, weight, bias, center = problem()
    turned = x.detach().T.contiguous().T.requires_grad_()
    upstream = torch.randn(4, 7, dtype=torch.float64).T
    for one, other in zip(
        value_and_gradients((turned, weight, bias, center), upstream),
        value_and_gradients((x, weight, bias, center), upstream),
        strict=True,
    ):
        assert_close(one, other)


def test_the_compiler_sees_one_op():
    case = problem(20, 5, torch.float32, torch.float32)
    upstream = torch.randn(20, 5)

    def normalised(x: Tensor, weight: Tensor, bias: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
        y, moments = batch_norm(x, weight, bias, center, EPS)
        return 2 * y, moments

    compiled = torch.compile(normalised, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(*case), normalised(*case), strict=True):
        assert torch.equal(one, other)
    found = (torch.autograd.grad(each(*case)[0], case[:3], upstream) for each in (compiled, normalised))
    assert all(map(torch.equal, *found))


def test_a_dry_run_needs_no_values():
    with FakeTensorMode():
        case = problem(16, 5, torch.bfloat16, torch.float32)
        y, moments, *gradients = value_and_gradients(case, torch.empty(16, 5))
    assert (y.shape, y.dtype) == ((16, 5), torch.bfloat16)
    assert (moments.shape, moments.dtype) == ((3, 5), torch.float32)
    assert [(g.shape, g.dtype) for g in gradients] == [(tensor.shape, tensor.dtype) for tensor in case[:3]]


@pytest.mark.parametrize("name", ["auto", "numba"])
def test_a_cpu_goes_the_references_way(name):
    if name == "numba":
        pytest.importorskip("numba")
    case = problem(30, 5, torch.float32, torch.float32)
    with use("reference"):
        expected = batch_norm(*case, EPS)
    with use(name):
        assert all(map(torch.equal, batch_norm(*case, EPS), expected))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((5,), (5,), (5,), (5,)), "(5,), (5,), (5,) and (5,)"),
        (((0, 5), (5,), (5,), (5,)), "(0, 5), (5,), (5,) and (5,)"),
        (((3, 5), (4,), (5,), (5,)), "(3, 5), (4,), (5,) and (5,)"),
        (((3, 5), (5,), (5, 1), (5,)), "(3, 5), (5,), (5, 1) and (5,)"),
        (((3, 5), (5,), (5,), ()), "(3, 5), (5,), (5,) and ()"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes, message):
    expected = f"expected tokens (T, F), one at least, and weight, bias and center (F,), not {message}"
    x, weight, bias, center = map(torch.zeros, shapes)
    with pytest.raises(ValueError, match=re.escape(expected)):
        batch_norm(x, weight, bias, center, EPS)


@pytest.mark.parametrize("tokens", [1, 5])
def test_the_ops_pass_pytorchs_check(tokens):
    case = problem(tokens)
    torch.library.opcheck(torch.ops.myriad.batch_norm, (*case, EPS))
    x, weight, *_ = (tensor.detach() for tensor in case)
    _, _, mean, inverse = torch.ops.myriad.batch_norm(*case, EPS)
    torch.library.opcheck(torch.ops.myriad.batch_norm_backward, (torch.randn_like(x), x, weight, mean, inverse, EPS))
