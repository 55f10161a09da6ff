"""Two processes compute what one computes on the joined input."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from myriad.distributed import all_reduce_sum, rank, world_size
from myriad.ffn.retrieval import BatchNorm

TOKENS = (5, 3)  # of each rank
FEATURES = 4


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of both ranks, a mask, and what their outputs are multiplied with in the loss."""
    generator = torch.Generator().manual_seed(0)
    x, upstream = torch.randn(2, sum(TOKENS), FEATURES, generator=generator, dtype=torch.float64)
    return x, torch.tensor([1, 1, 0, 1, 1, 1, 0, 1]).bool(), upstream


def normalised(x: Tensor, mask: Tensor | None, upstream: Tensor) -> dict[str, Tensor]:
    """One training step's numbers of a batch normalization."""
    norm = BatchNorm(FEATURES).double()
    norm.weight.data.copy_(torch.linspace(0.5, 2, FEATURES))
    x = x.clone().requires_grad_()
    y, load = norm(x, mask)
    (y * upstream).sum().backward()
    return {"y": y.detach(), "x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad, **load}


def one_rank(number: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=2)
    mine = slice(None, TOKENS[0]) if number == 0 else slice(TOKENS[0], None)
    x, mask, upstream = (tensor[mine] for tensor in inputs())
    strided = torch.arange(6.0).view(2, 3).mT if number else torch.zeros(3, 2)
    found = {
        "who": torch.tensor([rank(), world_size()]),
        "whole": normalised(x, None, upstream),
        "masked": normalised(x, mask, upstream),
        "strided": all_reduce_sum(strided),
        "input": strided,
    }
    torch.save(found, f"{folder}/{number}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each of two processes found."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(one_rank, (str(folder),), nprocs=2)
    return [torch.load(folder / str(number)) for number in range(2)]


def test_each_process_knows_its_place(ranks):
    assert [found["who"].tolist() for found in ranks] == [[0, 2], [1, 2]]


@pytest.mark.parametrize("part", ["whole", "masked"])
def test_values_and_gradients_equal_those_of_one_process(ranks, part):
    x, mask, upstream = inputs()
    expected = normalised(x, mask if part == "masked" else None, upstream)
    for name in ("y", "x"):
        assert_close(torch.cat([found[part][name] for found in ranks]), expected[name])
    for name in ("weight", "bias", "moments"):
        assert_close(ranks[0][part][name] + ranks[1][part][name], expected[name])
    # The ranks are not on their own: alone, the first would find other values.
    alone = normalised(x[: TOKENS[0]], None, upstream[: TOKENS[0]])
    assert (alone["x"] - ranks[0][part]["x"]).abs().max() > 1e-3


def test_the_input_stays_as_it_was(ranks):
    assert torch.equal(ranks[0]["input"], torch.zeros(3, 2))
    assert torch.equal(ranks[1]["input"], torch.arange(6.0).view(2, 3).mT)


def test_ranks_may_hold_different_memory_layouts(ranks):
    for found in ranks:
        assert torch.equal(found["strided"], torch.arange(6.0).view(2, 3).mT)


def test_one_process_is_the_trivial_case():
    x = torch.randn(3)
    assert (rank(), world_size()) == (0, 1)
    assert all_reduce_sum(x) is x
