"""Retrieval and lookup in one call against the two ops."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_threads import on_threads
from torch import Tensor
from torch.testing import assert_close

from myriad.ffn.peer import PEERConfig
from myriad.kernels import expert_lookup, product_key, retrieve, retrieved_lookup, use
from myriad.kernels.retrieved_lookup import ROUTERS, one_after_the_other

ACTIVATIONS = ["gelu", "relu", "silu", "none"]
quick = settings(deadline=None, max_examples=60)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(
    tokens: int = 3,
    heads: int = 2,
    side: int = 5,
    *,
    d_key: int = 4,
    width: int = 6,
    shared: bool = True,
    gated: bool = False,
    dtype: torch.dtype = torch.float32,
    table_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Tokens, queries, keys and tables."""
    keys = normal(*([] if shared else [heads]), 2, side, d_key, seed=seed + 2)
    tables = [normal(side**2, width, seed=seed + 3 + n, dtype=table_dtype) for n in range(2 + gated)]
    return normal(tokens, width, seed=seed, dtype=dtype), normal(tokens, heads, 2, d_key, seed=seed + 1), keys, tables


def test_routers():
    scores = torch.tensor([[[1.0, -1.0], [0.0, 0.0]]])  # one token, two heads
    e = torch.e
    expected = {
        "softmax": [[e / (e + 1 / e), 1 / e / (e + 1 / e)], [0.5, 0.5]],
        "sigmoid": [[e / (1 + e), 1 / (1 + e)], [0.5, 0.5]],
        "relu": [[1.0, 0.0], [0.0, 0.0]],
    }
    for router, weights in expected.items():
        assert_close(ROUTERS[router](scores), torch.tensor([weights]))


def test_retrieve_lays_the_heads_side_by_side():
    queries, keys = torch.randn(4, 2, 2, 3), torch.randn(2, 2, 5, 3)
    ids, weights = retrieve(queries, keys, 6, "softmax")
    assert ids.shape == weights.shape == (4, 12)
    second_ids, second_weights = retrieve(queries[:, 1:], keys[1:], 6, "softmax")
    assert torch.equal(ids[:, 6:], second_ids)
    assert_close(weights[:, 6:], second_weights)
    assert_close(weights[:, :6].sum(1), torch.ones(4))


class TestTheTwoOps:
    @pytest.mark.parametrize("router", ROUTERS)
    @pytest.mark.parametrize("gated", [False, True])
    def test_values(self, router, gated):
        x, queries, keys, tables = inputs(gated=gated)
        y, ids, weights = retrieved_lookup(x, queries, keys, 3, router, *tables, activation="silu")
        scores, expected = product_key(queries, keys, 3)
        assert torch.equal(ids, expected.flatten(1))
        assert torch.equal(weights, ROUTERS[router](scores).flatten(1))
        assert torch.equal(y, expert_lookup(x, ids, weights, *tables, activation="silu"))

    @pytest.mark.parametrize("router", ["softmax", "sigmoid"])
    def test_gradients(self, router):
        x, queries, keys, tables = inputs()
        leaves = [leaf.double().requires_grad_() for leaf in (x, queries, keys, *tables)]

        def y(x: Tensor, queries: Tensor, keys: Tensor, *tables: Tensor) -> Tensor:
            return retrieved_lookup(x, queries, keys, 3, router, *tables).y_TD

        assert torch.autograd.gradcheck(y, leaves)

    def test_dropped_weights_are_missing_in_y_alone(self):
        x, queries, keys, tables = inputs(tokens=4)
        whole = retrieved_lookup(x, queries, keys, 3, "softmax", *tables)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                torch.manual_seed(0)
                half = retrieved_lookup(x, queries, keys, 3, "softmax", *tables, dropout=0.5)
            torch.manual_seed(0)
            kept = torch.nn.functional.dropout(whole.weights_TA, 0.5)
            assert torch.equal(half.weights_TA, whole.weights_TA)
            assert_close(half.y_TD, expert_lookup(x, whole.ids_TA, kept, *tables))

    def test_refuses_what_they_refuse(self):
        x, queries, keys, tables = inputs()
        wrong = [
            ((x, queries[0], keys, 3, "softmax", *tables), "queries must have shape"),
            ((x, queries, keys[:1], 3, "softmax", *tables), "keys must have shape"),
            ((x, queries, keys[..., :3], 3, "softmax", *tables), "keys must have shape"),
            ((x, queries, keys, 26, "softmax", *tables), "k must lie between 1 and 25"),
            ((x, queries, keys, 3, "topsoft", *tables), "unknown router 'topsoft'"),
            ((x[:2], queries, keys, 3, "softmax", *tables), "expected x"),
            ((x, queries, keys, 3, "softmax", tables[0], tables[1][:, :5]), "every table must have shape"),
            ((x, queries, keys, 3, "softmax", tables[0][:, :5], tables[1][:, :5]), "every table must have shape"),
            ((x, queries, keys, 3, "softmax", *tables, None, "tanh"), "unknown activation 'tanh'"),
        ]
        for grad in (True, False):
            for arguments, why in wrong:
                with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=why):
                    retrieved_lookup(*arguments)
            with torch.set_grad_enabled(grad), pytest.raises(IndexError, match="ids must lie between 0 and 0"):
                retrieved_lookup(x, queries, keys, 3, "softmax", *(table[:1] for table in tables))


def tokens_of_calls(patch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call of the Numba kernel has, from now on."""
    pytest.importorskip("numba", reason="the Numba form needs numba")
    form = importlib.import_module("myriad.kernels.cpu.retrieved_lookup")
    kernel, seen = form._look_up, []
    patch.setattr(form, "_look_up", lambda *a: (seen.append(len(a[6])), kernel(*a))[1])
    return seen


class TestNumba:
    """A few tokens in one call, where nothing is to be recorded."""

    @pytest.fixture
    def calls(self, monkeypatch) -> list[int]:
        return tokens_of_calls(monkeypatch)

    @quick
    @given(
        sizes=st.tuples(
            st.integers(1, 6), st.integers(1, 5), st.integers(1, 40), st.integers(1, 20), st.integers(1, 40)
        ),
        k=st.integers(1, 20),
        seed=st.integers(0, 2**31),
        shared=st.booleans(),
        gated=st.booleans(),
        dtype=dtypes,
        table_dtype=dtypes,
        router=st.sampled_from(list(ROUTERS)),
        activation=st.sampled_from(ACTIVATIONS),
    )
    def test_is_the_two_ops(self, sizes, k, seed, shared, gated, dtype, table_dtype, router, activation):
        """The same experts, whatever the sizes; the exponential function is another, and bfloat16 keeps few digits."""
        tokens, heads, side, d_key, width = sizes
        options = {"d_key": d_key, "width": width, "shared": shared, "gated": gated, "seed": seed}
        x, queries, keys, tables = inputs(tokens, heads, side, dtype=dtype, table_dtype=table_dtype, **options)
        gate = tables[2] if gated else None
        arguments = x, queries, keys, min(k, side**2), router, *tables[:2], gate, activation
        with pytest.MonkeyPatch.context() as patch, torch.no_grad(), use("numba"):
            calls = tokens_of_calls(patch)
            found, expected = retrieved_lookup(*arguments), one_after_the_other(*arguments)
        assert calls == [tokens]
        assert torch.equal(found.ids_TA, expected.ids_TA)
        assert found.y_TD.dtype == dtype
        assert_close(found.weights_TA, expected.weights_TA, rtol=1e-6, atol=1e-7)
        digits = 2**-7 if dtype == torch.bfloat16 else 1e-5
        scale = max(1.0, float(expected.y_TD.float().abs().max()))
        assert_close(found.y_TD.float(), expected.y_TD.float(), rtol=digits, atol=digits * scale)

    def test_is_the_reference(self, calls):
        x, queries, keys, tables = inputs(3, 2, 30, d_key=16, width=40, gated=True)
        arguments = x, queries, keys, 8, "softmax", *tables
        with torch.no_grad():
            found = retrieved_lookup(*arguments)
            with use("reference"):
                expected = retrieved_lookup(*arguments)
        assert calls == [3]
        assert torch.equal(found.ids_TA, expected.ids_TA)
        assert_close(found.weights_TA, expected.weights_TA, rtol=1e-4, atol=1e-6)
        assert_close(found.y_TD, expected.y_TD, rtol=1e-4, atol=1e-5)

    def test_takes_a_few_tokens_without_gradients(self, calls):
        x, queries, keys, tables = inputs(40, 2)
        arguments = keys, 3, "softmax", *tables
        retrieved_lookup(x[:1], queries[:1], *arguments)
        assert not calls  # a gradient may be asked for
        with torch.no_grad():
            for tokens in (0, 1, 16, 17):  # 32 queries of heads that share their keys
                retrieved_lookup(x[:tokens], queries[:tokens], *arguments)
            assert calls == [1, 16]
            own = torch.stack((keys, keys)), *arguments[1:]
            for tokens in (32, 33):
                retrieved_lookup(x[:tokens], queries[:tokens], *own)
            assert calls == [1, 16, 32]
            half = [table[:20] for table in tables]  # ids may lie outside
            with pytest.raises(IndexError):
                retrieved_lookup(x[:16], queries[:16], keys, 25, "softmax", *half)
            double = [tensor.double() for tensor in (x, queries, keys, *tables)]
            retrieved_lookup(double[0][:1], double[1][:1], double[2], 3, "softmax", *double[3:])
            retrieved_lookup(x[:1], queries[:1].bfloat16(), keys.bfloat16(), *arguments[1:])
        assert calls == [1, 16, 32]

    @pytest.mark.parametrize("router", ROUTERS)
    @pytest.mark.parametrize("size", [0.0, 30.0, 1e4, float("inf"), float("nan")])
    def test_scores_of_any_size(self, router, size, calls):
        x, queries, keys, tables = inputs(2, 2, 9)
        arguments = x, queries * size, keys, 4, router, *tables, None, "gelu"
        with torch.no_grad():
            found, expected = retrieved_lookup(*arguments), one_after_the_other(*arguments)
        assert calls == [2]
        assert torch.equal(found.ids_TA, expected.ids_TA)
        assert_close(found.weights_TA, expected.weights_TA, rtol=1e-6, atol=1e-30, equal_nan=True)
        assert_close(found.y_TD, expected.y_TD, rtol=1e-5, atol=1e-5, equal_nan=True)

    def test_inputs_that_are_not_contiguous(self, calls):
        x, queries, keys, tables = inputs(4, 2, 9)
        apart = [torch.stack((t, t), dim=-1)[..., 0] for t in (x, queries, keys, *tables)]
        with torch.no_grad():
            found = retrieved_lookup(*apart[:3], 3, "softmax", *apart[3:])
            expected = retrieved_lookup(x, queries, keys, 3, "softmax", *tables)
        assert calls == [4, 4]
        assert all(map(torch.equal, found, expected))

    def test_a_token_has_the_same_digits_alone_and_on_any_number_of_threads(self, calls):
        x, queries, keys, tables = inputs(8, 2, 20, d_key=16, width=33)

        def look_up() -> list[Tensor]:
            with torch.no_grad():
                whole = retrieved_lookup(x, queries, keys, 7, "softmax", *tables)
                alone = retrieved_lookup(x[5:6], queries[5:6], keys, 7, "softmax", *tables)
            assert all(torch.equal(one[5:6], other) for one, other in zip(whole, alone, strict=True))
            return list(whole)

        first, *rest = on_threads((1, 2, 3), look_up)
        assert all(torch.equal(one, other) for run in rest for one, other in zip(run, first, strict=True))


@pytest.mark.parametrize("options", [{}, {"gated": True, "router": "sigmoid"}, {"shared_keys": False}])
def test_a_layer_gives_with_gradients_what_it_gives_without(options):
    torch.manual_seed(0)
    layer = PEERConfig(experts=400, heads=2, experts_per_head=4, d_key=8, dropout=0.2, **options).build(12).eval()
    x = torch.randn(1, 2, 12)
    with_gradients = layer(x, with_routing=True)
    with torch.no_grad():
        without = layer(x, with_routing=True)
    assert_close(without.y, with_gradients.y)
    assert torch.equal(without.routing[0].ids, with_gradients.routing[0].ids)
    assert_close(without.routing[0].weights, with_gradients.routing[0].weights)
