import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from myriad.data import DataError
from myriad.data.stream import Stream

CONTEXT = 4
TOKENS = np.arange(4 * 10 + 3, dtype=np.uint16)  # ten windows and two tokens left over


def starts(stream, position, count, **ranks):
    return stream.batch(position, count, **ranks)[0][:, 0].tolist()


def test_targets_are_the_next_tokens():
    ids, targets = Stream(TOKENS, CONTEXT, seed=0).batch(0, 10)
    assert ids.shape == targets.shape == (10, CONTEXT)
    assert ids.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, ids + 1)
    assert torch.equal(ids - ids[:, :1], torch.arange(CONTEXT).expand(10, -1))


@pytest.mark.parametrize("epoch", range(5))
def test_an_epoch_deals_every_window_once(epoch):
    stream = Stream(TOKENS, CONTEXT, seed=3)
    dealt = sorted(starts(stream, epoch * stream.windows, stream.windows))
    assert dealt == list(range(dealt[0], dealt[0] + 40, CONTEXT))
    assert 0 <= dealt[0] <= 2


def test_every_token_is_seen_in_some_epoch():
    stream = Stream(TOKENS, CONTEXT, seed=0)
    targets = stream.batch(0, 20 * stream.windows)[1]
    assert set(targets.flatten().tolist()) == {*TOKENS[1:].tolist()}


def test_epochs_and_seeds_differ():
    stream = Stream(TOKENS, CONTEXT, seed=0)
    first = starts(stream, 0, 10)
    assert first != starts(stream, 10, 10)
    assert first != starts(Stream(TOKENS, CONTEXT, seed=1), 0, 10)


@given(
    position=st.integers(0, 100),
    share=st.integers(1, 15),
    world=st.integers(1, 4),
    before=st.integers(0, 100),
)
def test_a_batch_depends_on_its_arguments_alone(position, share, world, before):
    count = share * world
    whole = starts(Stream(TOKENS, CONTEXT, seed=5), position, count)
    used = Stream(TOKENS, CONTEXT, seed=5)
    used.batch(before, 3)
    for rank in range(world):
        assert starts(used, position, count, rank=rank, world=world) == whole[rank::world]


def test_a_batch_is_the_sum_of_smaller_ones_across_epochs():
    stream = Stream(TOKENS, CONTEXT, seed=7)
    whole = starts(stream, 5, 40)
    assert [start for part in range(5) for start in starts(stream, 5 + 8 * part, 8)] == whole


def test_one_window_is_enough():
    ids, targets = Stream(TOKENS[: CONTEXT + 1], CONTEXT, seed=0).batch(0, 3)
    assert ids.tolist() == [[0, 1, 2, 3]] * 3
    assert targets.tolist() == [[1, 2, 3, 4]] * 3


def test_too_few_tokens_are_told():
    with pytest.raises(DataError, match="the split has 4 tokens; a context of 4 needs 5 or more"):
        Stream(TOKENS[:CONTEXT], CONTEXT, seed=0)


def test_ranks_share_equally():
    with pytest.raises(ValueError, match="3 windows cannot be shared by 2 ranks"):
        Stream(TOKENS, CONTEXT, seed=0).batch(0, 3, rank=0, world=2)


def test_the_order_stays_as_it_was_in_earlier_versions():
    assert starts(Stream(TOKENS, CONTEXT, seed=0), 0, 10) == [18, 26, 10, 30, 14, 22, 38, 2, 34, 6]
