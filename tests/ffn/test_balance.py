import math

import torch
from torch.testing import assert_close

from myriad.ffn.balance import Share, load_balance_loss, moved_bias, router_z_loss


def test_a_share_counts_in_whole_numbers():
    assert Share.of(1 / 49) == (1, 49)
    share = Share.of(1.25 * 2 / 8)
    assert (share.floor(17), share.ceil(17), share.least()) == (5, 6, 4)
    assert (int(share.floor(torch.tensor(17))), int(share.ceil(torch.tensor(17)))) == (5, 6)
    assert [share.floor(n) for n in (share.least() - 1, share.least())] == [0, 1]


def test_even_use_gives_the_experts_a_token_and_one_sided_use_the_number_of_experts():
    tokens, even = torch.tensor(6), torch.full((6, 3), 1 / 3)
    assert_close(load_balance_loss(torch.tensor([4, 4, 4]), even, tokens), torch.tensor(2.0))
    one_sided = torch.tensor([1.0, 0, 0]).expand(6, 3)
    assert_close(load_balance_loss(torch.tensor([6, 0, 0]), one_sided, tokens), torch.tensor(3.0))


def test_the_z_loss_is_the_mean_square_of_the_logsumexp_without_padding():
    logits = torch.tensor([[0.0, 0.0], [1.0, 1.0], [50.0, 3.0]])
    mask = torch.tensor([True, True, False])
    expected = (math.log(2) ** 2 + (1 + math.log(2)) ** 2) / 2
    assert_close(router_z_loss(logits, mask, torch.tensor(2)), torch.tensor(expected))
    assert_close(router_z_loss(logits[:2], None, torch.tensor(2)), torch.tensor(expected))
    assert router_z_loss(logits[:0], None, torch.tensor(0)) == 0


def test_the_bias_rises_under_the_mean_and_falls_over_it():
    bias, counts = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([3, 0, 6])
    assert_close(moved_bias(bias, counts, 0.25), torch.tensor([1.0, 1.25, 0.75]))
