import math

import pytest
import torch
from hypothesis import given, settings
from routings import routing, routings

from myriad.analysis.specialties import TokenTally, characteristic

VOCABULARY = 7


@settings(deadline=None)
@given(routings(batch=(2, 5)))
def test_draws_are_counted_by_expert_and_token(one):
    chosen = torch.arange(one.experts)[::3].flip(0)
    tokens = torch.arange(10).view(2, 5) * 3 % VOCABULARY
    tally = TokenTally(chosen, one.experts, VOCABULARY)
    for row in range(2):
        part = one._replace(ids=one.ids[row : row + 1], weights=one.weights[row : row + 1])
        tally.add(tokens[row : row + 1], part)
    by_hand = torch.zeros(len(chosen), VOCABULARY, dtype=torch.int64)
    for token, ids, weights in zip(tokens.flatten().tolist(), one.ids.flatten(0, 1), one.weights.flatten(0, 1)):  # noqa: B905
        for expert, weight in zip(ids.tolist(), weights.tolist(), strict=True):
            if weight and expert in chosen.tolist():
                by_hand[chosen.tolist().index(expert), token] += 1
    assert torch.equal(tally.counts, by_hand)


def test_no_expert_is_looked_at():
    tally = TokenTally(torch.tensor([], dtype=torch.int64), 4, VOCABULARY)
    tally.add(torch.tensor([[1]]), routing([[[0]]], [[[1.0]]], experts=4))
    assert tally.counts.shape == (0, VOCABULARY)


def test_share_and_lift():
    found = characteristic(torch.tensor([0, 6, 2, 0]), torch.tensor([60, 10, 20, 10]), 5)
    assert [each.token for each in found] == [1, 2]
    assert [each.share for each in found] == pytest.approx([0.75, 0.25])
    assert [each.lift for each in found] == pytest.approx([7.5, 1.25])


def test_neither_a_frequent_token_nor_a_rare_one_comes_first():
    """Token 0 is half of the text and half of the draws, token 1 the expert's own, token 2 came once, by chance."""
    text = torch.tensor([50_000, 1_000, 1, 48_999])
    found = characteristic(torch.tensor([500, 300, 1, 199]), text, 4)
    assert [each.token for each in found] == [1, 2]
    assert found[1].lift > found[0].lift


def test_tokens_are_ordered_by_their_part_of_the_divergence():
    counts, text = torch.tensor([5, 3, 8, 1]), torch.tensor([10, 30, 20, 40])
    parts = [c / 17 * math.log(c / 17 / (t / 100)) for c, t in zip(counts.tolist(), text.tolist(), strict=True)]
    found = characteristic(counts, text, 4)
    assert [each.token for each in found] == [2, 0]
    assert [each.share * math.log(each.lift) for each in found] == pytest.approx(sorted(parts, reverse=True)[:2])
    assert len(characteristic(counts, text, 1)) == 1


def test_an_expert_without_draws_has_no_tokens():
    assert characteristic(torch.zeros(3, dtype=torch.int64), torch.tensor([1, 2, 0]), 3) == []
