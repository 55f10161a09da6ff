import json
import math

import pytest
import torch
from hypothesis import given, settings
from routings import routing, routings

from myriad.analysis.heads import HeadTally
from myriad.ffn import Routing


def found(*parts):
    tally = HeadTally.of(parts[0])
    for part in parts:
        tally.add(part)
    return tally.finish("block 0")


def chosen(one):
    """Expert -> weight for every token and head, token by token."""
    slots = one.ids.shape[-1] // one.heads
    ids, weights = one.ids.reshape(-1, one.heads, slots).tolist(), one.weights.reshape(-1, one.heads, slots).tolist()
    return [
        [{expert: weight for expert, weight in zip(*head, strict=True) if weight} for head in zip(*token, strict=True)]
        for token in zip(ids, weights, strict=True)
    ]


def entropy_of(weights):
    total = math.fsum(weights)
    return -math.fsum(weight / total * math.log(weight / total) for weight in weights)


def mean(values):
    values = list(values)
    return math.fsum(values) / len(values) if values else math.nan


@settings(deadline=None)
@given(routings())
def test_all_figures_agree_with_counting_by_hand(one):
    layer, tokens = found(one), chosen(one)
    slots = one.ids.shape[-1] // one.heads
    for head in range(one.heads):
        weights = [list(token[head].values()) for token in tokens if token[head]]
        assert float(layer.entropy[head]) == pytest.approx(mean(map(entropy_of, weights)), abs=1e-12, nan_ok=True)
        assert int(layer.used[head]) == len(set().union(*(token[head] for token in tokens)))
    served = [sorted(head.values(), reverse=True) for token in tokens for head in token if head]
    for rank in range(slots):
        by_hand = mean(head[rank] / sum(head) if rank < len(head) else 0 for head in served)
        assert float(layer.weight_by_rank[rank]) == pytest.approx(by_hand, abs=1e-12, nan_ok=True)
    for a in range(one.heads):
        for b in range(one.heads):
            shared = mean(len(token[a].keys() & token[b].keys()) for token in tokens)
            chance = mean(len(token[a]) * len(token[b]) / one.experts for token in tokens)
            elsewhere = mean(len(first[a].keys() & second[b].keys()) for first in tokens for second in tokens)
            assert float(layer.shared[a, b]) == pytest.approx(shared)
            assert float(layer.shared_by_chance[a, b]) == pytest.approx(chance)
            assert float(layer.shared_elsewhere[a, b]) == pytest.approx(elsewhere)


@settings(deadline=None)
@given(routings(batch=(3, 4)))
def test_batches_add_up(one):
    parts = [one._replace(ids=one.ids[rows], weights=one.weights[rows]) for rows in (slice(1), slice(1, 3))]
    whole, in_parts = found(one), found(*parts)
    for name in ("entropy", "weight_by_rank", "shared", "shared_by_chance", "shared_elsewhere", "used"):
        torch.testing.assert_close(getattr(in_parts, name), getattr(whole, name), equal_nan=True)


def test_heads_that_choose_the_same_share_all_and_such_that_do_not_share_nothing():
    same = found(routing([[0, 1, 1, 0], [2, 3, 3, 2]], [[0.9, 0.1, 0.5, 0.5]] * 2, experts=16, heads=2))
    assert same.overlap() == pytest.approx((2, 2 * 2 / 16, 1))
    apart = found(routing([[0, 1, 2, 3], [0, 1, 2, 3]], [[0.9, 0.1, 0.5, 0.5]] * 2, experts=16, heads=2))
    assert apart.overlap() == pytest.approx((0, 2 * 2 / 16, 0))
    assert apart.shared.diag().tolist() == [2, 2]


def test_heads_with_common_habits_share_as_much_elsewhere():
    """Every head always takes the same experts, so that it does not matter at which token they are looked at."""
    habits = found(routing([[5, 6, 6, 7]] * 9, [[0.5] * 4] * 9, experts=100, heads=2))
    assert habits.overlap() == pytest.approx((1, 0.04, 1))


def test_heads_that_draw_uniformly_share_what_chance_gives():
    random = torch.Generator().manual_seed(0)
    ids = torch.rand(4000, 4, 64, generator=random).topk(8).indices.flatten(1)
    shared, chance, elsewhere = found(Routing(ids, torch.ones(ids.shape), 64, 4)).overlap()
    assert chance == 1
    assert shared == pytest.approx(1, rel=0.02)
    assert elsewhere == pytest.approx(1, rel=0.02)


def test_entropy_is_largest_for_equal_weights_and_zero_for_one_expert():
    equal = found(routing([[0, 1, 2, 3]], [[0.2] * 4], experts=9))
    assert equal.mean_entropy == pytest.approx(equal.largest_entropy) == pytest.approx(math.log(4))
    alone = found(routing([[0, 1, 2, 3]], [[0, 0, 0.7, 0]], experts=9))
    assert alone.mean_entropy == 0
    assert alone.weight_by_rank.tolist() == [1, 0, 0, 0]


def test_a_head_that_never_gives_a_weight_is_left_out_of_the_mean():
    layer = found(routing([[0, 1, 2, 3]], [[0, 0, 0.5, 0.5]], experts=9, heads=2))
    assert layer.entropy.isnan().tolist() == [True, False]
    assert layer.mean_entropy == pytest.approx(math.log(2))
    assert layer.used.tolist() == [0, 2]


def test_one_head_has_no_overlap():
    layer = found(routing([[0, 1]], [[0.5, 0.5]], experts=4))
    assert layer.overlap() is None
    record = json.loads(json.dumps(layer.record()))
    assert record["mean_shared"] is record["mean_shared_by_chance"] is record["mean_shared_elsewhere"] is None
    assert (record["heads"], record["slots"], record["by_head"]["used"]) == (1, 2, [2])


def test_a_million_experts_are_counted_one_by_one():
    experts, heads, slots = 2**20, 8, 16
    ids = torch.randint(experts, (256, heads * slots), generator=torch.Generator().manual_seed(0))
    ids[0, :2] = torch.tensor([0, experts - 1])
    layer = found(Routing(ids, torch.ones(ids.shape), experts, heads))
    assert layer.used.tolist() == [len(ids.view(256, heads, slots)[:, head].unique()) for head in range(heads)]
    _, chance, elsewhere = layer.overlap()
    assert chance == pytest.approx(slots**2 / experts)
    assert elsewhere == pytest.approx(chance, rel=0.2)
