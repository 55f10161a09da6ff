"""Passes that are launched: what gradients they leave."""

from contextlib import nullcontext

import pytest
import torch

from myriad.ffn.peer import PEERConfig
from myriad.train.passes import Launched
from myriad.train.replica import Replica
from tiny import tiny_model

IDS = torch.arange(32).view(2, 16) % 20


@pytest.mark.parametrize(("passes", "layout"), [(1, torch.sparse_coo), (2, torch.strided)])
def test_gradients_of_tables_are_sparse_further_up_where_a_step_has_one_pass(passes, layout):
    ffn = PEERConfig(experts=256, heads=2, experts_per_head=4, d_key=8)
    model = tiny_model(vocab_size=20, layers=1, ffns={"f": ffn}, pattern=["f"]).build()
    assert IDS.numel() * 8 == ffn.experts
    passed = Launched(Replica(model), nullcontext, torch.device("cpu"), targets=64, passes=passes)
    passed(IDS, IDS)
    tables = [parameter.grad for name, parameter in model.named_parameters() if "experts_" in name]
    assert len(tables) == 2
    assert all(grad is not None and grad.layout == layout for grad in tables)
