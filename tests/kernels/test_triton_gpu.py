"""The Triton form on a GPU, at the sizes of real layers, against the reference in float64 or in its own arithmetic."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close
from triton_form import assert_near

from myriad.analysis.plan.dry_run import LiveBytes
from myriad.ffn import PEERConfig
from myriad.kernels import (
    batch_norm,
    choices,
    cross_entropy,
    expert_lookup,
    lazy_adam,
    new_moments,
    product_key,
    rounded_adamw,
    softmax_gradient,
    use,
    value_lookup,
)
from myriad.models.loss import chunked_cross_entropy, chunked_logsumexp
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
    assert_equal_but_for_tipped(mine[:2], expected[:2])


def assert_equal_but_for_tipped(mine: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """A number at the edge of its random bits may tip to its other neighbor, a digit of bfloat16 away.

    What a digit was to a number then is more to it when later steps have brought it near zero.
    """
    for one, other in zip(mine, expected, strict=True):
        assert_close(one, other, rtol=2**-7, atol=2e-3)
        assert (one != other).float().mean() < 1e-3


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
    learns = (grad.values() != 0).any(dim=1)  # an expert far below zero has no gradient
    used, rows_used = grad.indices()[0][learns] - (rows - 8), grad.values()[learns].float()
    assert len(used) > 4
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


@pytest.mark.parametrize("query_norm", ["layer", "batch"])
def test_torch_compile_of_a_layer_with_dense_gradients(query_norm):
    layer = PEERConfig(experts=64**2, query_norm=query_norm).build(256).to(CUDA)
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
        chosen = choices("cuda", dtype)
        assert chosen.pop("retrieved_lookup") == "reference (no triton form)"  # which is two ops that have one
        assert set(chosen.values()) == {"triton (preferred on cuda)"}


def adam_numbers(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, device=CUDA, dtype=BFLOAT16, generator=generator)


def after_rounded_steps(form: str, shape: tuple[int, ...], dtype: torch.dtype, *, turned: bool = False) -> list[Tensor]:
    """A weight and its moments after three steps."""
    count, generator = math.prod(shape), torch.Generator(CUDA).manual_seed(1)
    weight = adam_numbers(count, generator).view(shape)
    state = [weight, torch.zeros_like(weight), torch.zeros_like(weight)]
    options = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "seed": 3}
    with use(form):
        for step in (1, 2, 3):
            grad = adam_numbers(count, generator).to(dtype)
            grad = grad.view(shape[::-1]).mT if turned else grad.view(shape)
            rounded_adamw(*state, grad, **options, step=step)
            del grad  # the next one needs its memory
    return state


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("shape", [(2048, 8192), (333, 1001), (1, 5), (0, 5)], ids=str)
def test_rounded_adamw(shape, dtype, turned):
    mine, expected = (after_rounded_steps(form, shape, dtype, turned=turned) for form in ("triton", "reference"))
    if math.prod(shape):
        assert_equal_but_for_tipped(tuple(mine), tuple(expected))


def test_rounded_adamw_of_more_than_2_31_numbers():
    """Its ends, and the numbers at which an offset of 32 bits would begin anew."""
    count, length = 2**31 + 2**20 + 3, 2**19
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of free memory")
    starts = (0, 2**30 - length // 2, 2**31 - length // 2, count - length)
    parts = {}
    for form in ("triton", "reference"):
        state = after_rounded_steps(form, (count,), BFLOAT16)
        parts[form] = tuple(part[start : start + length].clone() for part in state for start in starts)
        del state
        torch.cuda.empty_cache()
    assert_equal_but_for_tipped(parts["triton"], parts["reference"])


def test_rounded_adamw_is_bit_equal_from_run_to_run():
    first, again = (after_rounded_steps("triton", (1000, 1000), BFLOAT16) for _ in range(2))
    assert all(map(torch.equal, first, again))


GPT2, PADDED = 50257, 50304


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_cross_entropy(dtype):
    """A chunk of logits in float64, whose padding holds what no result may show."""
    logits = (3 * torch.randn(2048, PADDED, device=CUDA)).to(dtype)
    logits[:, GPT2:] = float("nan")
    targets = torch.randint(GPT2, (2048,), device=CUDA)
    targets[::5] = -1
    wide = logits[:, :GPT2].double().requires_grad_()
    expected = F.cross_entropy(wide, targets, ignore_index=-1, reduction="sum")
    (grad,) = torch.autograd.grad(expected, wide)
    with use("triton"):
        again = logits.clone()
        alone = cross_entropy(logits, targets, GPT2)
        totals = [softmax_gradient(each, targets, GPT2) for each in (logits, again)]
    for total in (alone, totals[0]):
        assert_close(total.double(), expected.detach(), rtol=1e-5, atol=0)
    assert totals[0] == totals[1]
    assert torch.equal(logits, again)
    assert not logits[:, GPT2:].any()
    rounding = 2**-8 if dtype == BFLOAT16 else 2e-5
    assert_close(logits[:, :GPT2].double(), grad, rtol=rounding, atol=1e-12)


def test_cross_entropy_of_more_than_2_31_logits():
    rows = 2**31 // PADDED + 50
    logits = torch.full((rows, PADDED), float("nan"), dtype=BFLOAT16, device=CUDA)
    last = torch.randn(8, PADDED, device=CUDA).to(BFLOAT16)
    logits[-8:] = last
    targets = torch.full((rows,), -1, device=CUDA)
    targets[-8:] = torch.arange(8, device=CUDA)
    with use("triton"):
        found = softmax_gradient(logits, targets, GPT2)
        expected = softmax_gradient(last, targets[-8:], GPT2)
    assert_close(found, expected)
    assert torch.equal(logits[-8:], last)
    assert not logits[:-8].any()


@pytest.mark.parametrize(
    ("vocabulary", "weight_dtype", "autocast"),
    [(GPT2, FLOAT32, True), (GPT2, FLOAT32, False), (GPT2, BFLOAT16, False), (PADDED, BFLOAT16, False)],
)
def test_the_loss_of_a_large_vocabulary(vocabulary, weight_dtype, autocast):
    """Chunks, padding, products and kernel together, against all logits in float64."""
    x = torch.randn(5000, 256, device=CUDA).to(weight_dtype).requires_grad_()
    weight = torch.randn(vocabulary, 256, device=CUDA).div_(16).to(weight_dtype).requires_grad_()
    targets = torch.randint(-1000, vocabulary, (5000,), device=CUDA)
    wide = [each.detach().double().requires_grad_() for each in (x, weight)]
    logits = wide[0] @ wide[1].T
    expected = F.cross_entropy(logits, targets.clamp(min=-1), ignore_index=-1, reduction="sum")
    gradients = torch.autograd.grad(expected, wide)
    with torch.autocast("cuda", BFLOAT16, enabled=autocast):
        found = chunked_cross_entropy(x, weight, targets)
        normalizer = chunked_logsumexp(x, weight)
        with torch.no_grad():
            alone = chunked_cross_entropy(x, weight, targets)
    share = close(BFLOAT16 if autocast else weight_dtype)
    assert_close(found.detach().double(), expected.detach(), rtol=max(share / 10, 1e-5), atol=0)
    assert_close(alone, found.detach(), rtol=1e-4, atol=0)
    assert_close(normalizer.detach().double(), logits.logsumexp(dim=1).detach(), rtol=max(share / 10, 1e-5), atol=0)
    for mine, theirs in zip(torch.autograd.grad(found, (x, weight)), gradients, strict=True):
        assert_near(mine, theirs.to(mine.dtype), share)
    theirs = torch.autograd.grad(logits_normalizer(*wide), wide)
    for mine, one in zip(torch.autograd.grad(normalizer.sum(), (x, weight)), theirs, strict=True):
        assert_near(mine, one.to(mine.dtype), 2 * share)


def logits_normalizer(x: Tensor, weight: Tensor) -> Tensor:
    return (x @ weight.T).logsumexp(dim=1).sum()


def test_a_dry_run_counts_the_loss_as_it_is():
    def run() -> None:
        x, weight = (torch.randn(rows, 256, device=CUDA, requires_grad=True) for rows in (5000, GPT2))
        targets = torch.zeros(5000, dtype=torch.int64, device=CUDA)
        with torch.autocast("cuda", BFLOAT16):
            chunked_cross_entropy(x, weight, targets).backward()

    run()  # the libraries' own memory stays
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    found = torch.cuda.max_memory_allocated() - before
    with FakeTensorMode(), LiveBytes() as live:
        run()
    assert live.peak == pytest.approx(found, rel=0.1)


def batch(tokens: int, features: int, dtype: torch.dtype, *, mean: float = 0.0) -> list[Tensor]:
    """Tokens, weight, bias and a center near their means."""
    deviation = torch.linspace(0.1, 3, features, device=CUDA)
    x = mean + torch.randn(tokens, features, device=CUDA) * deviation
    weight, bias, away = torch.randn(3, features, device=CUDA).unbind()
    return [x.to(dtype), weight, bias, mean + 0.3 * away * deviation]


def normalised_and_gradients(case: list[Tensor], upstream: Tensor) -> list[Tensor]:
    inputs = [tensor.detach().requires_grad_() for tensor in case[:3]]
    y, moments = batch_norm(*inputs, case[3])
    return [y, moments, *torch.autograd.grad(y, inputs, upstream.to(y.dtype))]


@pytest.mark.parametrize("weight_dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize(
    ("tokens", "features"), [(16384, 2048), (1024, 2048), (33, 4096), (5001, 300), (1000, 1), (70000, 7), (20, 256)]
)
def test_batch_norm(tokens, features, dtype, weight_dtype):
    case = batch(tokens, features, dtype)
    case[1:3] = (vector.to(weight_dtype) for vector in case[1:3])
    upstream = torch.randn(tokens, features, device=CUDA).to(dtype)
    with use("triton"):
        mine = normalised_and_gradients(case, upstream)
    with use("reference"):
        expected = normalised_and_gradients([tensor.double() for tensor in case], upstream)
    assert [tensor.dtype for tensor in mine] == [dtype, FLOAT32, dtype, weight_dtype, weight_dtype]
    for one, other in zip(mine, expected, strict=True):
        assert_near(one, other.to(one.dtype), close(one.dtype))


def test_batch_norm_of_features_far_from_zero():
    """Hundreds of standard deviations away, with a center near them: only the mean's own digits are lost."""
    case = batch(16384, 256, FLOAT32, mean=300.0)
    upstream = torch.randn(16384, 256, device=CUDA)
    with use("triton"):
        mine = normalised_and_gradients(case, upstream)
    with use("reference"):
        expected = normalised_and_gradients([tensor.double() for tensor in case], upstream)
    for one, other in zip(mine, expected, strict=True):
        assert_near(one, other.to(one.dtype), 1e-3)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_batch_norm_of_one_token(dtype):
    x, weight, bias, center = batch(1, 2048, dtype)
    with use("triton"):
        y, moments = batch_norm(x, weight, bias, center)
    away = x[0].float() - center
    assert_close(moments, torch.stack((torch.ones_like(away), away, away * away)))
    assert_close(y[0].float(), bias, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_batch_norm_is_bit_equal_from_run_to_run(dtype):
    case, upstream = batch(16384, 2048, dtype), torch.randn(16384, 2048, device=CUDA)
    with use("triton"):
        first, again = (normalised_and_gradients(case, upstream) for _ in range(2))
    assert all(map(torch.equal, first, again))


def test_batch_norm_of_more_than_2_31_numbers():
    """Its last rows, by the formula, from sums that PyTorch takes."""
    rows, features = 2**20 + 3, 2048
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of free memory")
    x, upstream = (torch.randn(rows, features, dtype=BFLOAT16, device=CUDA) for _ in range(2))
    weight, bias = torch.ones(features, device=CUDA), torch.zeros(features, device=CUDA)
    with use("triton"):
        y, moments = batch_norm(x.requires_grad_(), weight, bias, torch.zeros_like(bias))
        (grad,) = torch.autograd.grad(y, x, upstream)
    last, y, grad, last_upstream = (tensor[-8:].detach().float() for tensor in (x, y, grad, upstream))
    assert_near(moments[1], x.detach().sum(0, dtype=FLOAT32), 1e-3)
    # Of numbers as many as these, drawn at random, mean and gradients' sums are nearly zero.
    assert_near(y, last, 1e-2)
    assert_near(grad, last_upstream, 1e-2)
