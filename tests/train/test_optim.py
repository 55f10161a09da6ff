import copy
import itertools
import math
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

from myriad.config import ConfigError
from myriad.ffn import DenseConfig, FFNConfig, PEERConfig
from myriad.models import build
from myriad.train.optim import (
    NamedState,
    OptimConfig,
    RoleOptimizer,
    build_optimizer,
    clip_gradients,
    freeze,
    hold_weights,
    optimizer_state,
    restore_optimizer,
)
from tiny import tiny_model


def step_of(layer, optimizer, seed: int, dtype: torch.dtype = torch.float32) -> None:
    torch.manual_seed(seed)
    layer(torch.randn(8, 16, dtype=dtype)).y.square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def sparse_layer():
    torch.manual_seed(0)
    # 8 tokens x 8 experts of 1,024: the tables' gradients are sparse.
    return PEERConfig(experts=1024, heads=2, experts_per_head=4, d_key=8).build(16)


def test_a_whole_layer_equals_adamw_and_sparse_adam():
    mine, theirs = sparse_layer().double(), sparse_layer().double()
    optimizer = build_optimizer(mine, lr=1e-2, table_lr=3e-2, weight_decay=0.1)
    tables = [p for name, p in theirs.named_parameters() if name.startswith("experts")]
    matrices = [theirs.queries.proj.weight, theirs.keys]
    vectors = [p for p in theirs.parameters() if not any(p is other for other in (*tables, *matrices))]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0}], lr=1e-2, betas=(0.9, 0.95)
    )
    sparse = torch.optim.SparseAdam(tables, lr=3e-2, betas=(0.9, 0.95))
    for seed in range(4):
        step_of(mine, optimizer, seed, torch.float64)
        torch.manual_seed(seed)
        theirs(torch.randn(8, 16, dtype=torch.float64)).y.square().sum().backward()
        assert all(table.grad.is_sparse for table in tables)
        for other in (adamw, sparse):
            other.step()
            other.zero_grad()
    for (name, one), other in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-9), name


def test_unused_rows_stay_bit_for_bit():
    layer = sparse_layer()
    before = layer.experts_up.detach().clone()
    used = layer(torch.randn(8, 16), with_routing=True).routing[0].ids.unique()
    torch.manual_seed(7)
    x = torch.randn(8, 16)
    used = layer(x, with_routing=True).routing[0].ids.unique()
    layer(x).y.square().sum().backward()
    build_optimizer(layer, lr=1e-2).step()
    moved = (layer.experts_up != before).any(dim=1).nonzero().squeeze(1)
    assert torch.equal(moved, used)


def test_groups_follow_the_roles():
    model = build(tiny_model(vocab_size=50))
    optimizer = build_optimizer(model, lr=1e-3, table_lr=5e-3)
    assert isinstance(optimizer, torch.optim.Optimizer)
    groups = {group["role"]: group for group in optimizer.param_groups}
    assert groups["table"]["lr"] == 5e-3
    assert groups["table"]["weight_decay"] == groups["vector"]["weight_decay"] == 0
    assert groups["matrix"]["weight_decay"] > 0
    assert sum(len(group["params"]) for group in groups.values()) == len(list(model.parameters()))
    optimizer.scale_lr(0.5)
    assert (groups["table"]["lr"], groups["matrix"]["lr"]) == (2.5e-3, 5e-4)


def test_clipping_takes_one_norm_over_dense_and_sparse():
    layer = sparse_layer()
    layer(torch.randn(8, 16)).y.square().sum().backward()
    layer.experts_up.grad = layer.experts_up.grad + layer.experts_up.grad  # uncoalesced, as accumulation leaves it
    dense = [p.grad.to_dense().clone() for p in layer.parameters()]
    norm = math.sqrt(sum(g.square().sum().item() for g in dense))
    assert clip_gradients(layer.parameters(), norm / 2).item() == pytest.approx(norm, rel=1e-5)
    for parameter, before in zip(layer.parameters(), dense, strict=True):
        assert torch.allclose(parameter.grad.to_dense(), before / 2, rtol=1e-4)
    assert clip_gradients(layer.parameters(), norm).item() == pytest.approx(norm / 2, rel=1e-4)


def test_rows_that_stand_twice_count_as_their_sum():
    """As gradients of layers that share a table meet on a GPU: one after the other, not added up."""
    mine, theirs = sparse_layer(), sparse_layer()
    for layer in (mine, theirs):
        layer(torch.randn(8, 16, generator=torch.Generator().manual_seed(0))).y.square().sum().backward()
        for table in (layer.experts_down, layer.experts_up):
            one, other = table.grad * 0.25, table.grad * 0.75
            ids, rows = (torch.cat((one._indices(), other._indices()), 1), torch.cat((one._values(), other._values())))
            twice = torch.sparse_coo_tensor(ids, rows, table.shape, check_invariants=False)
            table.grad = twice if layer is mine else twice.to_dense()
        clip_gradients(layer.parameters(), 0.1)
        build_optimizer(layer, lr=1e-2).step()
    for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-7)
    assert not torch.equal(mine.experts_up, sparse_layer().experts_up)


def test_a_norm_that_is_not_finite_changes_nothing():
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.tensor([1.0, math.nan, 2.0])
    assert clip_gradients([parameter], 1.0).isnan()
    assert parameter.grad[0] == 1


def test_state_survives():
    layer = sparse_layer()
    optimizer = build_optimizer(layer, lr=1e-2)
    step_of(layer, optimizer, 0)
    names = {parameter: name for name, parameter in layer.named_parameters()}
    saved = copy.deepcopy(optimizer_state(optimizer, names))
    other = sparse_layer()
    other.load_state_dict(layer.state_dict())
    restored = build_optimizer(other, lr=1e-2)
    restore_optimizer(restored, {parameter: name for name, parameter in other.named_parameters()}, saved)
    step_of(layer, optimizer, 1)
    step_of(other, restored, 1)
    assert all(torch.equal(one, two) for one, two in zip(layer.parameters(), other.parameters(), strict=True))


def test_steps_are_counted_where_the_update_reads_them():
    """On the device only where PyTorch's fused AdamW does: ours would wait for the device."""
    with FakeTensorMode():
        exact, rounded, table = (
            torch.nn.Parameter(torch.empty(2, 2, dtype=dtype, device="cuda"))
            for dtype in (torch.float32, torch.bfloat16, torch.float32)
        )
        groups = [{"params": [exact, rounded], "role": "matrix"}, {"params": [table], "role": "table"}]
        names = {exact: "exact", rounded: "rounded", table: "table"}
        moments = {f"{moment}.{name}": exact for moment in ("exp_avg", "exp_avg_sq") for name in names.values()}
        optimizer = RoleOptimizer(groups)
        restore_optimizer(optimizer, names, NamedState(moments, dict.fromkeys(names.values(), 3)))
    devices = {name: optimizer.state[parameter]["step"].device.type for parameter, name in names.items()}
    assert devices == {"exact": "cuda", "rounded": "cpu", "table": "cpu"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_steps_on_a_gpu_are_those_on_a_cpu_and_wait_for_nothing(weights):
    peer = PEERConfig(experts=64, heads=2, experts_per_head=4, d_key=8)
    mine, theirs = (tiny_model(vocab_size=50, layers=1, ffns={"p": peer}, pattern=["p"]).build() for _ in range(2))
    mine.load_state_dict(theirs.state_dict())
    for model in (mine, theirs):
        hold_weights(model, weights)
    mine.cuda()
    optimizer, expected = build_optimizer(mine, lr=1e-2), build_optimizer(theirs, lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
            other.grad = torch.randn(other.shape, generator=generator).to(other.dtype)
            one.grad = other.grad.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        expected.step()
        if step == 1:
            names = {parameter: name for name, parameter in mine.named_parameters()}
            saved = optimizer_state(optimizer, names)
            assert set(saved.steps.values()) == {2}
            optimizer = build_optimizer(mine, lr=1e-2)
            restore_optimizer(optimizer, names, saved)
    one, other = (torch.cat([p.detach().cpu().flatten() for p in model.parameters()]) for model in (mine, theirs))
    if weights == "float32":
        assert_close(one, other, rtol=1e-4, atol=1e-5)
    else:  # a number at the edge of its bits may tip to the other neighbor
        assert_close(one, other, rtol=2**-7, atol=2e-3)
        assert (one != other).float().mean() < 1e-3


def test_what_is_frozen_stays_bit_for_bit_without_gradient_or_state():
    model = build(tiny_model(vocab_size=50, ffns={"dense": DenseConfig()}, pattern=["dense"]))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    freeze(model, ["embedding", "blocks.1", "blocks.0.attention.out.weight"])
    optimizer = build_optimizer(model, lr=1e-2)
    for _ in range(2):
        ids = torch.randint(50, (2, 32))
        model(ids, targets=ids).loss.backward()
        optimizer.step()
    names = {parameter: name for name, parameter in model.named_parameters()}
    trained = set(optimizer_state(optimizer, names).steps)
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("embedding.", "blocks.1.")) or name == "blocks.0.attention.out.weight"
        assert (parameter.grad is None) == frozen == torch.equal(parameter, before[name]) == (name not in trained), name
    assert optimizer_state(optimizer, names).tensors.keys() == {
        f"{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in trained
    }


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        (["norm", "blocks.10"], r"begins with 'blocks.10'.*known: embedding, blocks, norm"),
        (["block"], "'block'; did you mean 'blocks'"),
        (["embed"], "'embed'; did you mean 'embedding'"),
        ([""], "begins with ''"),
        (["embedding", "blocks", "norm"], "leaves no parameter to train"),
    ],
    ids=str,
)
def test_what_cannot_be_frozen_is_refused_by_name(frozen, message):
    with pytest.raises(ConfigError, match=f"optim.frozen: .*{message}"):
        freeze(build(tiny_model(vocab_size=50)), frozen)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_schedules(schedule):
    config = OptimConfig(schedule=schedule, warmup=10, final_lr=0.1, decay=0.2)
    course = [config.scale(step, 100) for step in range(100)]
    assert course[:10] == [pytest.approx((step + 1) / 10) for step in range(10)]
    assert course[10] == pytest.approx(1)
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(course[10:]))
    if schedule == "constant":
        assert course[-1] == 1
    else:
        assert course[-1] == pytest.approx(0.1, abs=0.06)
    if schedule == "wsd":
        assert course[79] == 1
        assert course[90] == pytest.approx(0.1 + 0.9 * 0.5)


def final_loss(text: str, weights: str, steps: int = 250) -> float:
    """Of a small model that learns a text's bytes."""
    ids = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    torch.manual_seed(0)
    model = tiny_model(vocab_size=256, layers=1, ffns={"d": DenseConfig()}, pattern=["d"]).build()
    hold_weights(model, weights)
    optimizer = build_optimizer(model, lr=3e-4)
    losses = []
    for _ in range(steps):
        windows = torch.stack([ids[start : start + 33] for start in torch.randint(len(ids) - 33, (16,)).tolist()])
        output = model(windows[:, :-1], targets=windows[:, 1:])
        (output.loss / output.targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((output.loss / output.targets).item())
    return sum(losses[-25:]) / 25


def test_bfloat16_weights_learn_as_float32_ones_where_rounding_to_the_nearest_does_not(text, monkeypatch):
    exact, rounded = final_loss(text, "float32"), final_loss(text, "bfloat16")
    monkeypatch.setattr(sys.modules["myriad.kernels.rounded_adamw"], "rounded_by", lambda x, bits: x.bfloat16())
    nearest = final_loss(text, "bfloat16")
    assert nearest > exact + 0.02
    assert abs(rounded - exact) < (nearest - exact) / 4


@pytest.mark.parametrize("ffn", [example for kind in FFNConfig.kinds.values() for example in kind.examples()])
def test_every_layer_trains_in_bfloat16(ffn):
    torch.manual_seed(0)
    model = tiny_model(vocab_size=50, layers=1, ffns={"f": ffn}, pattern=["f"], qk_norm=True).build()
    hold_weights(model, "bfloat16")
    buffers = {buffer.dtype for buffer in model.buffers()}
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(model, lr=1e-2)
    for _ in range(2):
        ids = torch.randint(50, (4, 32))
        output = model(ids, targets=ids)
        (output.loss + output.aux_loss).backward()
        optimizer.step()
        model.after_step(output.loads)
    state = model.state_dict()
    assert not [name for name, _ in model.named_parameters() if torch.equal(state[name], before[name])]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} == buffers
    assert all(value.isfinite().all() for value in state.values())
