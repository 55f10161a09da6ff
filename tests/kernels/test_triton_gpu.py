"""The Triton form on a GPU, at the sizes of real layers, against the reference in float64 or in its own arithmetic."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from triton_form import assert_near

from myriad.ffn import PEERConfig
from myriad.kernels import choices, expert_lookup, lazy_adam, new_moments, product_key, use, value_lookup
from myriad.train.optim import build_optimizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def poisoned() -> None:
    """Freed memory full of numbers that no result may show."""
    torch.manual_seed(0)
    torch.full((2**28,), float("nan"), device=CUDA)


def close(dtype: torch.dtype) -> float:
    """The share of its norm by which a result may miss exact arithmetic."""
    return 1e-2 if dtype == BFLOAT16 else 1e-5


def problem(
    tokens: int, width: int, experts: int, *, active=128, gated=False, x_dtype=FLOAT32, dtype=FLOAT32
) -> list[Tensor | None]:
    tables = [torch.randn(experts, width, device=CUDA).mul_(width**-0.5).to(dtype) for _ in range(2 + gated)]
    x, weights = torch.randn(tokens, width, device=CUDA).to(x_dtype), torch.randn(tokens, active, device=CUDA)
    ids = torch.randint(experts, (tokens, active), device=CUDA)
    return [x, ids, weights, *tables, *([] if gated else [None])]


def value_and_gradients(case: list[Any], upstream: Tensor, **options: Any) -> list[Tensor]:
    case = [t.detach().requires_grad_() if t is not None and t.is_floating_point() else t for t in case]
    y = expert_lookup(*case, **options)
    return [y, *torch.autograd.grad(y, [t for t in case if t is not None and t.requires_grad], upstream.to(y.dtype))]


def assert_is_exact(case: list[Any], dtype: torch.dtype, **options: Any) -> None:
    upstream = torch.randn(case[0].shape, device=CUDA)
    with use("triton"):
        mine = value_and_gradients(case, upstream, **options)
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in case]
    with use("reference"):
        expected = value_and_gradients(wide, upstream, **options)
    for one, other in zip(mine, expected, strict=True):
        assert_near(one, other.to(one.dtype), close(dtype))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("x_dtype", "dtype"), [(FLOAT32, FLOAT32), (BFLOAT16, FLOAT32), (BFLOAT16, BFLOAT16)], ids=str)
@pytest.mark.parametrize(
    ("tokens", "width", "gated", "activation"),
    [
        (2048, 256, False, "gelu"),
        (1, 256, False, "gelu"),
        (200, 1024, True, "silu"),
        (64, 300, True, "relu"),
        (64, 300, False, "none"),
    ],
)
def test_expert_lookup(tokens, width, gated, activation, x_dtype, dtype, sparse):
    case = problem(tokens, width, 128**2, gated=gated, x_dtype=x_dtype, dtype=dtype)
    assert_is_exact(case, min(x_dtype, dtype, key=lambda d: d.itemsize), activation=activation, sparse=sparse)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_all_tokens_on_one_expert(share, sparse):
    case = problem(1000, 256, 64**2)
    case[1] = case[1].masked_fill(torch.rand(case[1].shape, device=CUDA) < share, 77)
    assert_is_exact(case, FLOAT32, sparse=sparse)


def test_an_empty_batch():
    assert_is_exact(problem(0, 256, 64**2), FLOAT32, sparse=True)
    assert_is_exact(problem(0, 256, 64**2), FLOAT32, sparse=False)


@pytest.mark.parametrize("sparse", [False, True])
def test_expert_lookup_is_bit_equal_from_run_to_run(sparse):
    case = problem(4096, 256, 256**2)
    case[1][::3] = 5
    upstream = torch.randn(case[0].shape, device=CUDA)
    with use("triton"):
        first, again = (value_and_gradients(case, upstream, sparse=sparse) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        if one.layout == torch.sparse_coo:
            assert torch.equal(one.indices(), other.indices())
            one, other = one.values(), other.values()
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("sparse", [False, True])
def test_value_lookup(sparse, dtype):
    ids = torch.randint(128**2, (2048, 32), device=CUDA)
    inputs = torch.randn(2048, 32, device=CUDA), torch.randn(128**2, 256, device=CUDA).to(dtype)
    upstream = torch.randn(2048, 256, device=CUDA)
    results = []
    for form, wide in (("triton", False), ("reference", True)):
        weights, values = ((t.double() if wide else t).detach().requires_grad_() for t in inputs)
        with use(form):
            y = value_lookup(ids, weights, values, sparse=sparse)
            results.append([y, *torch.autograd.grad(y, (weights, values), upstream.to(y.dtype))])
    for mine, expected in zip(*results, strict=True):
        assert_near(mine, expected.to(mine.dtype), close(dtype))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("tokens", "side", "k", "dtype"),
    [
        (2048, 1024, 16, FLOAT32),
        (500, 300, 64, FLOAT32),
        (1, 1024, 16, FLOAT32),
        (64, 5, 25, FLOAT32),
        (64, 2500, 1, FLOAT32),
        (512, 256, 16, BFLOAT16),
    ],
)
def test_product_key(tokens, side, k, dtype, shared):
    heads = 8
    queries = torch.randn(tokens, heads, 2, 128, device=CUDA).to(dtype).requires_grad_()
    shape = (2, side, 128) if shared else (heads, 2, side, 128)
    keys = torch.randn(shape, device=CUDA).mul_(128**-0.5).to(dtype).requires_grad_()
    upstream = torch.randn(tokens, heads, k, device=CUDA).to(dtype)
    with use("triton"):
        scores, ids = product_key(queries, keys, k)
        mine = torch.autograd.grad(scores, (queries, keys), upstream)
    exact = [t.detach().double().requires_grad_() for t in (queries, keys)]
    with use("reference"):
        best, _ = product_key(*exact, k)
    tolerance = {"rtol": 2**-8, "atol": 1e-2} if dtype == BFLOAT16 else {"rtol": 1e-5, "atol": 2e-5}
    assert_close(scores.double(), best, **tolerance)
    assert (ids.sort(dim=-1).values.diff(dim=-1) > 0).all()
    found = scores_of(*exact, ids)
    assert_close(scores.double(), found, **tolerance)
    expected = torch.autograd.grad(found, exact, upstream.double())
    for one, other in zip(mine, expected, strict=True):
        assert_near(one, other.to(one.dtype), close(dtype))


def scores_of(queries: Tensor, keys: Tensor, ids: Tensor) -> Tensor:
    """The scores of given experts, a head at a time."""
    side = keys.shape[-2]
    scores = []
    for head in range(queries.shape[1]):
        of_head = keys if keys.ndim == 3 else keys[head]
        halves = [queries[:, head, half] @ of_head[half].T for half in (0, 1)]
        places = ids[:, head] // side, ids[:, head] % side
        scores.append(sum(scores.gather(1, place) for scores, place in zip(halves, places, strict=True)))
    return torch.stack(scores, dim=1)


def test_tensorfloat_settings_do_not_round_the_scores():
    queries, keys = torch.randn(300, 2, 2, 128, device=CUDA), torch.randn(2, 128, 128, device=CUDA)
    with use("triton"):
        before = product_key(queries, keys, 8)
        torch.set_float32_matmul_precision("medium")
        try:
            with torch.autocast("cuda", BFLOAT16):
                inside = product_key(queries, keys, 8)
        finally:
            torch.set_float32_matmul_precision("highest")
    assert all(map(torch.equal, before, inside))


@pytest.mark.parametrize("layout", [torch.strided, torch.sparse_coo])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("width", [256, 1000, 3000])
def test_table_update(width, dtype, layout):
    start = torch.randn(4096, width, device=CUDA).to(dtype)
    results = []
    for form in ("triton", "reference"):
        table = start.clone()
        moments = new_moments(table)
        generator = torch.Generator(CUDA).manual_seed(1)
        with use(form):
            for step in (1, 2, 3):
                grad = torch.randn(4096, width, device=CUDA, generator=generator).to(dtype)
                grad[torch.rand(4096, device=CUDA, generator=generator) < 0.5] = 0
                grad = grad.to_sparse(1) if layout == torch.sparse_coo else grad
                lazy_adam(table, *moments, grad, lr=0.01, betas=(0.9, 0.95), eps=1e-8, step=step, seed=3)
        results.append((table, *moments))
    mine, expected = results
    if dtype == FLOAT32:
        assert_close(mine, expected, rtol=1e-5, atol=1e-6)
        return
    assert_close(mine[2], expected[2], rtol=1e-5, atol=1e-9)
    for one, other in zip(mine[:2], expected[:2], strict=True):  # a number at the edge of its bits may tip
        assert_close(one, other, rtol=2**-7, atol=1e-4)
        assert (one != other).float().mean() < 1e-2


def test_tables_of_more_than_2_31_numbers():
    rows, width = 2**21 + 3, 1024
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of free memory")
    table = torch.zeros(rows, width, dtype=BFLOAT16, device=CUDA)
    last = torch.randn(8, width, device=CUDA).bfloat16()
    table[-8:] = last
    x, ids = torch.randn(4, width, device=CUDA), torch.randint(rows - 8, rows, (4, 16), device=CUDA)
    weights = torch.randn(4, 16, device=CUDA)
    with use("triton"):
        table.requires_grad_()
        y = expert_lookup(x, ids, weights, table, table, sparse=True)
        (grad,) = torch.autograd.grad(y.sum(), table)
        small = last.float().requires_grad_()
        expected = expert_lookup(x, ids - (rows - 8), weights, small, small)
        (small_grad,) = torch.autograd.grad(expected.sum(), small)
        assert_near(y, expected, 1e-2)
        grad = grad.coalesce()
        assert_near(grad.values().float(), small_grad[grad.indices()[0] - (rows - 8)], 2e-2)
        table = table.detach()
        lazy_adam(table, *new_moments(table), grad, lr=0.1, betas=(0.9, 0.99), eps=1e-8, step=1)
    assert not table[: rows - 8].any()
    used, rows_used = grad.indices()[0] - (rows - 8), grad.values().float()
    move = 0.1 * rows_used / rows_used.square().mean(dim=1, keepdim=True).sqrt()
    assert_near((last.float() - table[-8:].float())[used], move, 0.15)


@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16])
def test_a_layer_trains(precision):
    """A PEER layer learns a map of its input; its first steps are those of the reference."""
    losses = {}
    for form in ("triton", "reference"):
        torch.manual_seed(0)
        layer = PEERConfig(experts=64**2, heads=4, d_key=32).build(64).to(CUDA)
        optimizer = build_optimizer(layer, lr=3e-3)
        x = torch.randn(512, 64, device=CUDA)
        target = torch.tanh(x.roll(1, dims=1))
        with use(form):
            losses[form] = [train_step(layer, optimizer, x, target, precision) for _ in range(20)]
    tolerance = 1e-3 if precision == FLOAT32 else 2e-2
    assert losses["triton"][:3] == pytest.approx(losses["reference"][:3], rel=tolerance)
    assert losses["triton"][-1] < 0.8 * losses["triton"][0]


def train_step(layer: Any, optimizer: Any, x: Tensor, target: Tensor, precision: torch.dtype) -> float:
    with torch.autocast("cuda", precision, enabled=precision != FLOAT32):
        loss = (layer(x).y.float() - target).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def test_torch_compile_of_a_layer_with_dense_gradients():
    layer = PEERConfig(experts=64**2, query_norm="layer").build(256).to(CUDA)
    x = torch.randn(1024, 256, device=CUDA)
    gradients = []
    for forward in (layer, torch.compile(layer, fullgraph=True)):
        layer.zero_grad(set_to_none=True)
        forward(x).y.square().sum().backward()
        gradients.append([p.grad for p in layer.parameters()])
    for eager, compiled in zip(*gradients, strict=True):
        assert_near(compiled, eager, 1e-3)


def test_auto_takes_triton():
    for dtype in (FLOAT32, BFLOAT16):
        assert set(choices("cuda", dtype).values()) == {"triton (preferred on cuda)"}
