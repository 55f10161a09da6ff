"""Two processes compute what one computes on the joined input."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from myriad.config import ConfigError, MyriadError
from myriad.distributed import all_reduce_sum, joined, once, rank, share, total, total_rows, world_size
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
    found |= {"exchanged": exchanged(number), "once": [once(lambda: [rank(), "told"]), refused()]}
    torch.save(found, f"{folder}/{number}")
    dist.destroy_process_group()


def rows(number: int) -> Tensor:
    """Each rank's rows of a table: both have rows of their own, and share one."""
    ids = [[1, 4, 7], [4]][number]
    values = torch.full((len(ids), 3), 10.0**number)
    return torch.sparse_coo_tensor(torch.tensor([ids]), values, (9, 3)).coalesce()


def uncoalesced(number: int) -> Tensor:
    """The same in halves, as gradients of two layers meet."""
    half = rows(number) / 2
    ids, values = torch.cat((half.indices(), half.indices()), dim=1), torch.cat((half.values(), half.values()))
    return torch.sparse_coo_tensor(ids, values, half.shape, check_invariants=False)


def exchanged(number: int) -> dict[str, Tensor | list[Tensor]]:
    shared = torch.full((2,), float(number + 1), requires_grad=True)
    share([shared])
    mixed = [torch.tensor(number + 1), torch.full((2, 2), float(number)), torch.tensor([[number * 2.0]])]
    empty = torch.sparse_coo_tensor(torch.empty(1, 0, dtype=torch.long), torch.empty(0, 3), (9, 3)).coalesce()
    return {
        "shared": shared.detach(),
        "total": total(mixed),
        "rows": total_rows(rows(number)),
        "uncoalesced": total_rows(uncoalesced(number)),
        "one empty": total_rows(rows(0) if number else empty),
        "dense rows": total_rows(rows(number).to_dense()),
    }


def refused() -> str:
    """The text of a fault of the first rank, as this rank hears of it."""

    def refuse() -> None:
        raise ConfigError("not like this")

    try:
        once(refuse)
    except MyriadError as error:
        return str(error)
    return ""


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


def test_tensors_of_any_shape_and_dtype_are_summed(ranks):
    for found in ranks:
        assert found["exchanged"]["shared"].tolist() == [1, 1]
        count, square, one = found["exchanged"]["total"]
        assert (count.dtype, count.item()) == (torch.int64, 3)
        assert (square.tolist(), one.tolist()) == ([[1, 1], [1, 1]], [[2]])


def test_sparse_rows_are_summed_and_stay_sparse(ranks):
    expected = (rows(0).to_dense() + rows(1).to_dense()).to_sparse(1).coalesce()
    for found in ranks:
        summed = found["exchanged"]["rows"]
        assert summed.is_coalesced()
        assert torch.equal(summed.indices(), expected.indices())
        assert torch.equal(summed.values(), expected.values())
        assert torch.equal(found["exchanged"]["uncoalesced"].to_dense(), expected.to_dense())
        assert torch.equal(found["exchanged"]["one empty"].to_dense(), rows(0).to_dense())
        assert torch.equal(found["exchanged"]["dense rows"], expected.to_dense())


def test_what_one_process_does_reaches_all_faults_too(ranks):
    assert [found["once"] for found in ranks] == [[[0, "told"], "not like this"]] * 2


def test_a_process_alone_joins_nothing(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with joined():
        assert not dist.is_initialized()
    monkeypatch.setenv("WORLD_SIZE", "2")  # a leftover of some scheduler: nobody said where to meet
    monkeypatch.delenv("MASTER_ADDR")
    with joined():
        assert not dist.is_initialized()


def test_one_process_is_the_trivial_case():
    x = torch.randn(3)
    assert (rank(), world_size()) == (0, 1)
    assert all_reduce_sum(x) is x
    assert total([x])[0] is x
    assert total_rows(rows(0)).is_coalesced()
    assert once(lambda: 3) == 3
