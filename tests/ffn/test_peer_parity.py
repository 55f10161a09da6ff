"""PEER against an independent implementation, the package PEER-pytorch, on the same weights and inputs."""

import pytest
import torch

from myriad import kernels
from myriad.analysis.bench import peer_pytorch
from myriad.config import ConfigError
from myriad.ffn import PEERConfig

needs_peer_pytorch = pytest.mark.skipif(not peer_pytorch.installed(), reason=f"PEER-pytorch {peer_pytorch.ABSENT}")

COMMON = {"shared_keys": False, "query_norm": "none"}
D_MODEL = 32
CASES = {
    "the paper's router": {"experts": 16**2, "heads": 3, "experts_per_head": 4, "d_key": 8},
    "as many experts per head as sub-keys": {"experts": 4**2, "heads": 2, "experts_per_head": 4, "d_key": 8},
    "more experts per head than sub-keys": {"experts": 4**2, "heads": 2, "experts_per_head": 6, "d_key": 8},
    "sparse gradients": {"experts": 64**2, "heads": 2, "experts_per_head": 8, "d_key": 16},
    "their default: one expert per head": {
        "experts": 16**2,
        "heads": 6,
        "experts_per_head": 1,
        "d_key": 8,
        "router": "relu",
    },
    "relu experts": {"experts": 16**2, "heads": 2, "experts_per_head": 4, "d_key": 16, "activation": "relu"},
    "linear experts": {"experts": 16**2, "heads": 2, "experts_per_head": 4, "d_key": 16, "activation": "none"},
    "silu experts": {"experts": 16**2, "heads": 2, "experts_per_head": 4, "d_key": 16, "activation": "silu"},
}


@pytest.fixture(params=["reference", "auto"], autouse=True)
def form(request):
    """The reference and the fast kernels are held to theirs."""
    if request.param == "auto":
        pytest.importorskip("myriad.kernels.cpu")
    with kernels.use(request.param):
        yield


@needs_peer_pytorch
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_outputs_and_gradients_are_theirs(options):
    torch.manual_seed(0)
    ours = PEERConfig(**COMMON, **options).build(D_MODEL)
    theirs = peer_pytorch.their_layer(ours)
    x_BSD, grad_BSD = torch.randn(2, 12, D_MODEL), torch.randn(2, 12, D_MODEL)
    x, their_x = x_BSD.clone().requires_grad_(), x_BSD.clone().requires_grad_()

    y, their_y = ours(x).y, theirs(their_x)
    y.backward(grad_BSD)
    their_y.backward(grad_BSD)

    assert (y != 0).any()
    torch.testing.assert_close(y, their_y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad, their_x.grad, rtol=1e-4, atol=1e-5)
    grads = peer_pytorch.in_their_layout(ours.config, {name: p.grad for name, p in ours.named_parameters()})
    their_grads = {name: p.grad for name, p in theirs.named_parameters()}
    assert grads.keys() == their_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad.to_dense(), their_grads[name], rtol=1e-4, atol=1e-5, msg=name)
        assert (their_grads[name] != 0).any(), name


@needs_peer_pytorch
def test_both_are_exact_in_float64():
    torch.manual_seed(0)
    ours = PEERConfig(**COMMON, **CASES["the paper's router"]).build(D_MODEL).double()
    x = torch.randn(1, 20, D_MODEL, dtype=torch.float64)
    torch.testing.assert_close(ours(x).y, peer_pytorch.their_layer(ours)(x), rtol=1e-12, atol=1e-12)


@needs_peer_pytorch
def test_adam_moves_both_alike_where_every_expert_is_used():
    """Their users' dense Adam and our lazy one differ only on rows that a step leaves alone."""
    from myriad.train.optim import build_optimizer

    torch.manual_seed(0)
    ours = PEERConfig(**COMMON, experts=4**2, heads=4, experts_per_head=4, d_key=8).build(D_MODEL)
    theirs = peer_pytorch.their_layer(ours)
    start = {name: weight.detach().clone() for name, weight in theirs.named_parameters()}
    rates = {"lr": 1e-3, "betas": (0.9, 0.99)}
    optimizers = build_optimizer(ours, weight_decay=0.0, **rates), torch.optim.Adam(theirs.parameters(), **rates)
    x, grad = torch.randn(1, 64, D_MODEL), torch.randn(1, 64, D_MODEL)
    for _ in range(3):
        for output, optimizer in zip((ours(x).y, theirs(x)), optimizers, strict=True):
            output.backward(grad)
            optimizer.step()
            optimizer.zero_grad()
    weights = peer_pytorch.in_their_layout(ours.config, dict(ours.named_parameters()))
    for name, weight in theirs.named_parameters():
        moved = (weight - start[name]).norm()
        assert moved > 0, name
        # An element whose gradient is nearly zero may step either way: elements are not compared one by one.
        assert (weights[name] - weight).norm() < 1e-3 * moved, name


@needs_peer_pytorch
def test_shared_tables_are_the_same_memory_and_others_are_not():
    ours = PEERConfig(**COMMON, **CASES["the paper's router"]).build(D_MODEL)
    table = ours.experts_down.data_ptr()
    assert peer_pytorch.their_layer(ours, share=True).weight_down_embed.weight.data_ptr() == table
    assert peer_pytorch.their_layer(ours).weight_down_embed.weight.data_ptr() != table


@needs_peer_pytorch
@pytest.mark.parametrize(
    "options",
    [{"shared_keys": True}, {"query_norm": "batch"}, {"gated": True}, {"router": "sigmoid"}, {"router": "relu"}],
    ids=lambda options: next(iter(options)),
)
def test_options_that_they_lack_are_refused(options):
    config = PEERConfig(**{**COMMON, **CASES["the paper's router"], **options})
    with pytest.raises(ConfigError, match=next(iter(options))):
        peer_pytorch.their_layer(config.build(D_MODEL))
