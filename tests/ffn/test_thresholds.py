import itertools

import pytest
import torch
from torch.testing import assert_close

from myriad.ffn.balance import Share
from myriad.ffn.thresholds import RunningThresholds, best_of_each, chosen_routing, reaches, take_best

HALF = Share.of(0.5)
SCORES = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.5, 0.5]])


def test_each_expert_takes_its_best_tokens():
    taken = take_best(SCORES, HALF)
    assert taken.tokens_EC.tolist() == [[0, 2], [1, 3]]
    assert_close(taken.scores_EC, torch.tensor([[0.9, 0.6], [0.8, 0.5]]))
    assert_close(taken.cutoffs_E, torch.tensor([0.6, 0.5]))


def test_a_share_that_is_a_whole_number_of_tokens_is_not_rounded_down():
    for tokens in range(1, 200):
        scores = torch.rand(tokens, 2)
        assert take_best(scores, Share.of(1 / tokens)).tokens_EC.shape == (2, 1)
        mask = torch.ones(tokens, dtype=torch.bool)
        assert int((take_best(scores, Share.of(1 / tokens), mask).scores_EC > 0).sum()) == 2


def test_padding_is_not_taken_and_leaves_less_to_take():
    mask = torch.tensor([False, True, True, False])
    taken = take_best(SCORES, HALF, mask)
    assert taken.tokens_EC[:, 0].tolist() == [2, 1]
    assert_close(taken.scores_EC, torch.tensor([[0.6, 0], [0.8, 0]]))
    assert_close(taken.cutoffs_E, torch.tensor([0.6, 0.8]))
    alone = take_best(SCORES[1:3], HALF)
    assert_close(taken.cutoffs_E, alone.cutoffs_E)


def test_nothing_is_taken_of_padding_alone():
    taken = take_best(SCORES, HALF, torch.zeros(4, dtype=torch.bool))
    assert not taken.scores_EC.any()
    assert not taken.cutoffs_E.any()


def test_groups_choose_each_by_itself():
    torch.manual_seed(0)
    scores = torch.rand(2, 3, 6, 4)
    mask = torch.rand(2, 3, 6) < 0.7
    mask[0, 0] = False
    thresholds = torch.rand(4)
    for given in (None, mask):
        together = take_best(scores, HALF, given)
        reached = reaches(scores, thresholds, given)
        for group in itertools.product(range(2), range(3)):
            alone = take_best(scores[group], HALF, None if given is None else given[group])
            for one, other in zip(together, alone, strict=True):
                assert torch.equal(one[group], other)
            one = None if given is None else given[group]
            assert torch.equal(reached[group], reaches(scores[group], thresholds, one))
    kept = best_of_each(scores, reached, 1)
    assert torch.equal(kept[1, 2], best_of_each(scores[1, 2], reached[1, 2], 1))


def test_groups_count_by_their_tokens():
    thresholds = RunningThresholds(2, 0.9, 0.5)
    cutoffs, tokens = torch.tensor([[0.1, 0.2], [0.4, 0.8], [0.9, 0.9]]), torch.tensor([30, 10, 0])
    thresholds.after_step(thresholds.load(cutoffs, tokens))
    assert_close(thresholds.value, torch.tensor([0.175, 0.35]))


def test_routing_lists_the_chosen_experts_best_first():
    chosen = torch.tensor([[True, True], [False, True], [False, False], [True, False]])
    for shape in ((4,), (2, 2)):
        routing = chosen_routing(SCORES.view(*shape, 2), chosen.view(*shape, 2))
        assert (routing.ids.shape, routing.experts) == ((*shape, 2), 2)
        assert_close(routing.weights.view(4, 2), torch.tensor([[0.9, 0.1], [0.8, 0], [0, 0], [0.5, 0]]))
        assert routing.ids.view(4, 2)[:2, 0].tolist() == [0, 1]
    assert chosen_routing(SCORES[:0], chosen[:0]).ids.shape == (0, 1)


def test_scores_that_reach_a_threshold():
    reached = reaches(SCORES, torch.tensor([0.5, 0.5]))
    assert reached.tolist() == [[True, False], [False, True], [True, False], [True, True]]
    assert reaches(SCORES, torch.tensor([0.5, 0.5]), torch.tensor([True, True, False, False])).sum() == 2


def test_the_cap_keeps_the_best():
    chosen = torch.ones(4, 2, dtype=torch.bool)
    chosen[3] = torch.tensor([False, True])
    kept = best_of_each(SCORES, chosen, 1)
    assert kept.tolist() == [[True, False], [False, True], [True, False], [False, True]]
    assert best_of_each(SCORES, chosen, None) is chosen
    assert best_of_each(SCORES, chosen, 2) is chosen
    none = torch.zeros(4, 2, dtype=torch.bool)
    assert not best_of_each(SCORES, none, 1).any()


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_thresholds_are_an_average_whose_weights_add_up_to_one(decay):
    thresholds = RunningThresholds(2, decay, 0.25)
    assert thresholds.value.tolist() == [0.25, 0.25]
    seen = torch.rand(5, 2)
    for cutoffs in seen:
        thresholds.after_step(thresholds.load(cutoffs, 3))
    weights = torch.tensor([decay**age for age in reversed(range(5))])
    assert_close(thresholds.value, (weights.unsqueeze(1) * seen).sum(0) / weights.sum())
    assert int(thresholds.steps) == 5


def test_micro_batches_count_by_their_tokens():
    thresholds = RunningThresholds(1, 0.9, 0.5)
    parts = [thresholds.load(torch.tensor([cutoff]), tokens) for cutoff, tokens in ((0.1, 30), (0.4, 10))]
    thresholds.after_step({name: sum(part[name] for part in parts) for name in parts[0]})
    assert_close(thresholds.value, torch.tensor([0.175]))


def test_without_tokens_nothing_moves():
    thresholds = RunningThresholds(1, 0.9, 0.5)
    thresholds.after_step(thresholds.load(torch.tensor([0.1]), 0))
    thresholds.after_step({})
    assert (float(thresholds.value), int(thresholds.steps)) == (0.5, 0)
