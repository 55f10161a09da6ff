"""Queries, their normalizations, and keys."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from myriad.config import ConfigError
from myriad.ffn.retrieval import (
    BatchNorm,
    Queries,
    new_keys,
    retrieval_cost,
    side_of,
)

D, HEADS, WIDTH = 5, 3, 4


def tokens(count: int = 10, features: int = D, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, features, generator=generator, dtype=torch.float64) * 2 + 1


def batch_norms() -> tuple[BatchNorm, nn.BatchNorm1d]:
    """Ours and PyTorch's, of the same gain and bias."""
    mine, theirs = BatchNorm(D).double(), nn.BatchNorm1d(D).double()
    for norm in (mine, theirs):
        norm.weight.data.copy_(torch.linspace(0.5, 2, D))
        norm.bias.data.copy_(torch.linspace(-1, 1, D))
    return mine, theirs


@pytest.mark.parametrize("side", [1, 2, 31, 1024, 2**20])
def test_the_side_of_a_square(side):
    assert side_of(side**2) == side


@pytest.mark.parametrize("experts", [1000, 31**2 + 1, 32**2 - 1])
def test_a_number_that_is_no_square_names_the_nearest(experts):
    expected = rf"nearest to {experts}: 31\*\*2 = 961 and 32\*\*2 = 1024"
    with pytest.raises(ConfigError, match=expected):
        side_of(experts)


def test_batch_norm_has_the_gradients_of_pytorchs():
    mine, theirs = batch_norms()
    x, upstream = tokens().requires_grad_(), tokens(seed=1)
    found = torch.autograd.grad(mine(x, None)[0], (x, mine.weight, mine.bias), upstream)
    expected = torch.autograd.grad(theirs(x), (x, theirs.weight, theirs.bias), upstream)
    assert_close(found, expected)


def test_batch_norm_sees_only_what_the_mask_keeps():
    mine, theirs = batch_norms()
    x = tokens()
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 1, 0, 1, 1]).bool()
    y, load = mine(x, mask)
    assert_close(y[mask], theirs(x[mask]))
    mine.update(load)
    assert_close(mine.running_mean, theirs.running_mean)
    assert_close(mine.running_var, theirs.running_var)


def test_running_statistics_move_in_update_alone():
    mine, _ = batch_norms()
    _, load = mine(tokens(), None)
    assert torch.equal(mine.running_mean, torch.zeros(D).double())
    assert torch.equal(mine.running_var, torch.ones(D).double())
    mine.update(load)
    assert (mine.running_mean != 0).all()
    assert (mine.running_var != 1).all()


def test_micro_batches_move_the_running_statistics_as_their_union():
    (mine, theirs), x = batch_norms(), tokens(12)
    mask = torch.arange(12) % 5 != 2
    parts = [
        mine(part, part_mask)[1]["moments"]
        for part, part_mask in zip(x.split([3, 8, 1]), mask.split([3, 8, 1]), strict=True)
    ]
    mine.update({"moments": sum(parts)})
    theirs(x[mask])
    assert_close(mine.running_mean, theirs.running_mean)
    assert_close(mine.running_var, theirs.running_var)


def test_evaluation_uses_the_running_statistics_and_reports_none():
    mine, theirs = batch_norms()
    x = tokens()
    mine.update(mine(x, None)[1])
    theirs(x)
    mine.eval(), theirs.eval()
    y, load = mine(tokens(3, seed=1), None)
    assert load == {}
    assert_close(y, theirs(tokens(3, seed=1)))


@pytest.mark.parametrize("count", [0, 1])
def test_a_batch_without_variance_is_finite_and_teaches_nothing(count):
    mine, _ = batch_norms()
    y, load = mine(tokens(count), None)
    assert y.isfinite().all()
    mine.update(load)
    assert torch.equal(mine.running_var, torch.ones(D).double())


def test_a_mask_that_keeps_nothing_is_finite():
    mine, _ = batch_norms()
    y, load = mine(tokens(), torch.zeros(10, dtype=torch.bool))
    assert y.isfinite().all()
    assert (load["moments"] == 0).all()


@pytest.mark.parametrize("norm", ["batch", "layer", "rms", "none"])
def test_queries_are_normalised_linear_maps(norm):
    queries = Queries(D, HEADS, WIDTH, norm).double()
    x = tokens()
    plain = (x @ queries.proj.weight.T).view(10, HEADS, 2, WIDTH)
    both_halves = {"dim": (2, 3), "keepdim": True}
    expected = {
        "batch": (plain - plain.mean(0)) / (plain.var(0, correction=0) + 1e-5).sqrt(),
        "layer": (plain - plain.mean(**both_halves)) / (plain.var(correction=0, **both_halves) + 1e-5).sqrt(),
        "rms": plain / plain.square().mean(**both_halves).sqrt(),
        "none": plain,
    }[norm]
    found, load = queries(x, None)
    assert_close(found, expected)
    assert set(load) == ({"moments"} if norm == "batch" else set())


@pytest.mark.parametrize("norm", ["batch", "layer", "rms", "none"])
def test_queries_leave_autocast_in_float32(norm):
    queries = Queries(D, HEADS, WIDTH, norm)
    with torch.autocast("cpu", torch.bfloat16):
        found, load = queries(tokens().float(), None)
    assert found.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in load.values())


def test_after_step_moves_batch_norm_and_no_other():
    batch, rms = Queries(D, HEADS, WIDTH, "batch"), Queries(D, HEADS, WIDTH, "rms")
    _, load = batch(tokens().float(), None)
    batch.after_step(load)
    assert (batch.norm.running_mean != 0).all()
    batch.after_step({})
    rms.after_step({})


@pytest.mark.parametrize(("shared", "shape"), [(True, (2, 6, WIDTH)), (False, (HEADS, 2, 6, WIDTH))])
def test_keys_are_shared_or_each_heads_own(shared, shape):
    keys = new_keys(36, HEADS, WIDTH, shared)
    assert keys.shape == shape
    assert keys.requires_grad


def test_normalised_queries_get_scores_of_order_one():
    torch.manual_seed(0)
    keys = new_keys(64**2, 1, 256, shared=True).detach()
    scores = torch.randn(100, 256) @ keys[0].T
    assert 0.9 < float(scores.std()) < 1.1


@pytest.mark.parametrize("norm", ["batch", "layer", "rms", "none"])
@pytest.mark.parametrize("shared", [True, False])
def test_cost_counts_what_is_built(norm, shared):
    cost = retrieval_cost(D, 36, HEADS, WIDTH, shared, norm)
    queries, keys = Queries(D, HEADS, WIDTH, norm), new_keys(36, HEADS, WIDTH, shared)
    parameters = sum(p.numel() for p in queries.parameters()) + keys.numel()
    assert cost.parameters == cost.active_parameters == parameters
    # Two for each multiply-add: the map to queries, then each head's halves against six sub-keys.
    assert cost.flops == 2 * (D * HEADS * 2 * WIDTH) + 2 * (HEADS * 2 * 6 * WIDTH)
