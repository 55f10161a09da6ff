"""The Numba forms against the reference, against brute force, and against what may go wrong in memory."""

import importlib
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from on_threads import on_threads
from torch import Tensor
from torch.testing import assert_close

from myriad.kernels import expert_lookup, lazy_adam, new_moments, product_key, use, value_lookup

pytest.importorskip("numba", reason="the Numba forms need numba")
from myriad.kernels.cpu import memory, simd, table_gradient, threads
from myriad.kernels.cpu.byte_scores import multiplies_bytes
from myriad.kernels.cpu.table_gradient import bounds_of_pieces, segments

numba_product_key = importlib.import_module("myriad.kernels.cpu.product_key")
quick = settings(deadline=None, max_examples=40)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(function, inputs: list[Tensor], **options) -> list[Tensor]:
    """The output and the gradients of every floating point input."""
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
    y = function(*leaves, **options)
    upstream = normal(*y.shape, seed=99).to(y.dtype)
    found = torch.autograd.grad(y, [leaf for leaf in leaves if leaf.requires_grad], upstream)
    return [y.detach(), *(grad.to_dense() for grad in found)]


def assert_same(function, inputs: list[Tensor], **options) -> None:
    """Both forms agree: but for the order of float32 sums, and the last digit of what is kept in bfloat16."""
    with use("reference"):
        expected = gradients(function, inputs, **options)
    with use("numba"):
        found = gradients(function, inputs, **options)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == theirs.dtype
        rtol = 2**-6 if mine.dtype == torch.bfloat16 else 1e-5
        scale = max(1.0, float(theirs.float().abs().max())) if theirs.numel() else 1.0  # sums may cancel
        assert_close(mine.float(), theirs.float(), rtol=rtol, atol=rtol * scale)


class TestLookups:
    """Few rows, so that a token often has one twice; sometimes one row alone, one active one, or no token."""

    @quick
    @given(
        sizes=st.tuples(st.integers(0, 9), st.integers(1, 9), st.integers(1, 40), st.integers(1, 70)),
        seed=st.integers(0, 2**31),
        dtype=dtypes,
        table_dtype=dtypes,
        gated=st.booleans(),
        sparse=st.booleans(),
        activation=st.sampled_from(["gelu", "relu", "silu", "none"]),
    )
    def test_expert_lookup(self, sizes, seed, dtype, table_dtype, gated, sparse, activation):
        tokens, active, experts, width = sizes
        ids = torch.randint(experts, (tokens, active), generator=torch.Generator().manual_seed(seed))
        inputs = [normal(tokens, width, seed=seed, dtype=dtype), ids, normal(tokens, active, seed=seed + 1)]
        inputs += [normal(experts, width, seed=seed + 2 + n, dtype=table_dtype) for n in range(2 + gated)]
        assert_same(expert_lookup, inputs, activation=activation, sparse=sparse)

    @quick
    @given(
        sizes=st.tuples(st.integers(0, 9), st.integers(1, 9), st.integers(1, 40), st.integers(1, 70)),
        seed=st.integers(0, 2**31),
        table_dtype=dtypes,
        sparse=st.booleans(),
    )
    def test_value_lookup(self, sizes, seed, table_dtype, sparse):
        tokens, active, rows, width = sizes
        ids = torch.randint(rows, (tokens, active), generator=torch.Generator().manual_seed(seed))
        inputs = [ids, normal(tokens, active, seed=seed), normal(rows, width, seed=seed + 1, dtype=table_dtype)]
        assert_same(value_lookup, inputs, sparse=sparse)

    @pytest.mark.parametrize("experts", [50, 100_000])
    @pytest.mark.parametrize("one", [False, True])
    def test_many_tokens_on_all_threads(self, experts, one):
        ids = torch.randint(1 if one else experts, (300, 40), generator=torch.Generator().manual_seed(0))
        tables = [normal(experts, 48, seed=n) for n in (1, 2)]
        inputs = [normal(300, 48, seed=3), ids, normal(300, 40, seed=4), *tables]
        assert_same(expert_lookup, inputs)

    @quick
    @given(lines=st.integers(1, 3), seed=st.integers(0, 2**31), table_dtype=dtypes, sparse=st.booleans())
    def test_gradients_written_past_the_cache(self, lines, seed, table_dtype, sparse):
        width = lines * simd.LINE // table_dtype.itemsize
        ids = torch.randint(20, (9, 5), generator=torch.Generator().manual_seed(seed))
        weights = normal(9, 5, seed=seed)
        weights[:, 0] *= 1e-40  # denormal numbers
        weights[0] = float("nan")
        tables = [normal(20, width, seed=seed + n, dtype=table_dtype) for n in (1, 2)]
        inputs = [normal(9, width, seed=seed + 3), ids, weights, *tables]
        with pytest.MonkeyPatch.context() as patch:
            near = gradients(expert_lookup, inputs, sparse=sparse)
            patch.setattr(table_gradient, "PAST_CACHE", 0)
            past = gradients(expert_lookup, inputs, sparse=sparse)
        for mine, theirs in zip(past, near, strict=True):
            assert torch.equal(mine.nan_to_num(7), theirs.nan_to_num(7))

    @pytest.mark.parametrize("experts", [64, 100_000])
    def test_is_bit_equal_from_run_to_run_and_near_on_another_number_of_threads(self, experts):
        ids = torch.randint(experts, (200, 32), generator=torch.Generator().manual_seed(0))
        inputs = [normal(200, 40, seed=3), ids, normal(200, 32, seed=4), *(normal(experts, 40, seed=n) for n in (1, 2))]
        runs = on_threads((2, 2, 1, 3), lambda: gradients(expert_lookup, inputs))
        assert all(map(torch.equal, runs[0], runs[1]))
        for other in runs[2:]:
            for mine, theirs in zip(other, runs[0], strict=True):
                assert_close(mine, theirs, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("experts", [64, 100_000])
    def test_a_token_depends_on_no_other_token_and_on_no_number_of_threads(self, experts):
        """To the last digit: a later layer that retrieves would turn a digit into another expert."""
        ids = torch.randint(experts, (200, 32), generator=torch.Generator().manual_seed(0))
        others = ids.clone()
        others[100:] = torch.randint(experts, (100, 32), generator=torch.Generator().manual_seed(1)) // 3
        x, weights, *tables = (
            normal(200, 40, seed=3),
            normal(200, 32, seed=4),
            *(normal(experts, 40, seed=n) for n in (1, 2)),
        )
        runs = on_threads((1, 2, 3), lambda: [expert_lookup(x, rows, weights, *tables)[:100] for rows in (ids, others)])
        assert all(torch.equal(one, runs[0][0]) for run in runs for one in run)

    def test_callers_in_several_threads_get_the_values_of_one(self):
        def lookup(seed: int) -> list[Tensor]:
            ids = torch.randint(5000, (128, 32), generator=torch.Generator().manual_seed(seed))
            tables = [normal(5000, 32, seed=n) for n in (1, 2)]
            return gradients(expert_lookup, [normal(128, 32, seed=seed), ids, normal(128, 32, seed=seed + 1), *tables])

        with use("numba"):
            alone = [lookup(seed) for seed in range(8)]
            with ThreadPoolExecutor(4) as pool:
                together = list(pool.map(lookup, range(8)))
        for mine, theirs in zip(together, alone, strict=True):
            assert all(map(torch.equal, mine, theirs))


class TestProductKey:
    @pytest.fixture(autouse=True, params=["bytes", "products", "few"])
    def way(self, request, monkeypatch):
        """Coarse scores from products of bytes, from a float32 product, or from the caller, whatever the size."""
        if request.param == "bytes" and not multiplies_bytes():
            pytest.skip("this processor does not add up products of bytes")
        monkeypatch.setattr(numba_product_key, "multiplies_bytes", lambda: request.param == "bytes")
        monkeypatch.setattr(numba_product_key, "FEW", 1000 if request.param == "few" else -1)

    def check(self, queries: Tensor, keys: Tensor, k: int) -> None:
        """The scores are the best in float64 but for float32 rounding, of distinct experts that have them."""
        with use("numba"):
            scores, ids = product_key(queries, keys, k)
        heads = queries.shape[1]
        keys_HPSQ = (keys if keys.ndim == 4 else keys.expand(heads, *keys.shape)).double()
        halves = torch.einsum("thpq,hpsq->thps", queries.double(), keys_HPSQ)
        sums = (halves[:, :, 0, :, None] + halves[:, :, 1, None, :]).flatten(2)
        tolerance = 1e-5 * max(1.0, float(sums.abs().max())) if sums.numel() else 0.0
        assert ids.shape == scores.shape == (*queries.shape[:2], k)
        assert_close(scores.double(), sums.topk(k, dim=-1).values, rtol=0, atol=tolerance)
        assert_close(scores.double(), sums.gather(-1, ids), rtol=0, atol=tolerance)
        assert (ids.sort(dim=-1).values.diff(dim=-1) > 0).all()
        assert (scores.diff(dim=-1) <= 0).all()

    @settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        tokens=st.integers(0, 70),
        heads=st.integers(1, 3),
        side=st.integers(1, 40),
        width=st.integers(1, 20),
        data=st.data(),
        shared=st.booleans(),
        seed=st.integers(0, 2**31),
    )
    @example(tokens=65, heads=1, side=40, width=8, data=None, shared=True, seed=0)
    def test_equals_brute_force(self, tokens, heads, side, width, data, shared, seed):
        k = 40 if data is None else data.draw(st.sampled_from([1, side]) | st.integers(1, min(side * side, 200)))
        shape = (2, side, width) if shared else (heads, 2, side, width)
        self.check(normal(tokens, heads, 2, width, seed=seed), normal(*shape, seed=seed + 1), k)

    @pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-4, 1e-2])
    def test_is_exact_where_coarse_scores_cannot_tell_the_keys_apart(self, spread):
        keys = normal(2, 1, 32, seed=0).expand(2, 200, 32) + spread * normal(2, 200, 32, seed=1)
        queries = normal(100, 2, 2, 32, seed=2)
        with use("numba"):
            scores, ids = product_key(queries, keys, 16)
        halves = torch.einsum("thpq,psq->thps", queries.double(), keys.double())
        sums = (halves[:, :, 0, :, None] + halves[:, :, 1, None, :]).flatten(2)
        assert_close(scores.double(), sums.topk(16, dim=-1).values, rtol=0, atol=2e-5)
        assert_close(scores.double(), sums.gather(-1, ids), rtol=0, atol=2e-5)

    def test_many_rows_of_the_papers_size_have_the_winners_of_float32(self):
        queries, keys = normal(256, 8, 2, 128, seed=0), normal(2, 1024, 128, seed=1) * 128**-0.5
        with use("numba"):
            _, ids = product_key(queries, keys, 16)
        halves = torch.einsum("thpq,psq->thps", queries, keys).topk(17, dim=-1)
        best, index = halves.values[..., :16], halves.indices[..., :16]
        sums, pick = (best[:, :, 0, :, None] + best[:, :, 1, None, :]).flatten(2).topk(17, dim=-1)
        expected = index[:, :, 0].gather(-1, pick // 16) * 1024 + index[:, :, 1].gather(-1, pick % 16)
        clear = (sums[..., 15] - sums[..., 16] > 1e-5) & ((halves.values[..., 15] - halves.values[..., 16]) > 1e-5).all(
            -1
        )
        assert clear.float().mean() > 0.99
        assert torch.equal(ids.sort(-1).values[clear], expected[..., :16].sort(-1).values[clear])

    @pytest.mark.parametrize(
        ("tokens", "heads", "side", "width", "k"),
        [(300, 1, 65, 128, 16), (37, 2, 300, 33, 70), (66, 1, 1100, 16, 300), (5, 3, 64, 4, 1), (600, 1, 70, 19, 33)],
    )
    def test_words_blocks_and_chunks_that_are_not_full(self, tokens, heads, side, width, k):
        self.check(normal(tokens, heads, 2, width, seed=0), normal(heads, 2, side, width, seed=1), k)

    @pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-18, 1e-3, 1e3, 1e15])
    def test_sub_keys_and_queries_of_any_size(self, scale):
        queries, keys = normal(70, 1, 2, 16, seed=0), normal(2, 90, 16, seed=1)
        for one, other in ((queries * scale, keys), (queries, keys * scale)):
            with use("numba"):
                scores, ids = product_key(one, other, 8)
            halves = torch.einsum("thpq,psq->thps", one.double(), other.double())
            sums = (halves[:, :, 0, :, None] + halves[:, :, 1, None, :]).flatten(2)
            tolerance = 1e-6 * float(sums.abs().max())
            assert_close(scores.double(), sums.topk(8, dim=-1).values, rtol=0, atol=tolerance)
            assert_close(scores.double(), sums.gather(-1, ids), rtol=0, atol=tolerance)

    def test_one_sub_key_or_number_far_larger_than_the_others(self):
        keys = normal(2, 200, 32, seed=0)
        keys[0, 3] *= 1000
        keys[1, :, 5] *= 1000
        queries = normal(100, 1, 2, 32, seed=1)
        queries[:, :, 0, 7] *= 1000
        self.check(queries, keys, 16)

    def test_infinities_of_both_signs_stay_inside_the_table(self):
        queries, keys = normal(70, 1, 2, 16, seed=0).abs(), normal(2, 30, 16, seed=1).abs()
        keys[0, :15], keys[1, 15:] = float("inf"), -float("inf")
        with use("numba"):
            _, ids = product_key(queries, keys, 8)
        assert ids.min() >= 0
        assert ids.max() < 900
        assert (ids.sort(dim=-1).values.diff(dim=-1) > 0).all()

    def test_a_token_depends_on_no_other_token_and_on_no_number_of_threads(self):
        """To the last digit, or a near-tie would fall as others have it."""
        queries, keys = normal(150, 2, 2, 24, seed=0), normal(2, 2, 130, 24, seed=1)
        others = queries.clone()
        others[:50], others[51:] = normal(50, 2, 2, 24, seed=2) * 9, normal(99, 2, 2, 24, seed=3)
        runs = on_threads((1, 2, 3), lambda: [product_key(some, keys, 16) for some in (queries, others)])
        expected_scores, expected_ids = runs[0][0]
        for scores, ids in (one for run in runs for one in run):
            assert torch.equal(scores[50], expected_scores[50])
            assert torch.equal(ids[50], expected_ids[50])

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, 1e38])
    def test_broken_and_extreme_queries_stay_inside_the_table(self, value):
        queries, keys = normal(70, 1, 2, 16, seed=0), normal(2, 30, 16, seed=1)
        queries[3, 0, 0] = value
        queries[4] = value
        with use("numba"):
            scores, ids = product_key(queries, keys, 8)
        assert ids.min() >= 0
        assert ids.max() < 900
        assert (ids.sort(dim=-1).values.diff(dim=-1) > 0).all()
        if value != value:
            assert scores[3:5].isnan().any(dim=-1).all()
        sound = [token for token in range(70) if token not in (3, 4)]
        self.check(queries[sound], keys, 8)

    def test_a_broken_key_is_not_passed_over(self):
        queries, keys = normal(70, 1, 2, 16, seed=0), normal(2, 30, 16, seed=1)
        keys[1, 7, 3] = float("nan")
        with use("numba"):
            scores, ids = product_key(queries, keys, 8)
        assert scores.isnan().any()
        assert ids.min() >= 0
        assert ids.max() < 900

    @quick
    @given(
        sizes=st.tuples(st.integers(0, 20), st.integers(1, 3), st.integers(1, 12), st.integers(1, 20)),
        shared=st.booleans(),
        seed=st.integers(0, 2**31),
    )
    def test_gradients(self, sizes, shared, seed):
        tokens, heads, side, width = sizes
        shape = (2, side, width) if shared else (heads, 2, side, width)
        inputs = [normal(tokens, heads, 2, width, seed=seed), normal(*shape, seed=seed + 1)]
        k = min(5, side * side)

        def chosen(form: str):
            with use(form):
                return product_key(*inputs, k)[1]

        if torch.equal(chosen("reference"), chosen("numba")):  # but for ties
            assert_same(lambda queries, keys: product_key(queries, keys, k)[0], inputs)


class TestTableUpdate:
    OPTIONS = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-3}

    def after(self, form: str, dtype: torch.dtype, sparse: bool) -> list[Tensor]:
        table = normal(40, 37, seed=0, dtype=dtype)
        state = [table, *new_moments(table)]
        with use(form):
            for step in range(1, 6):
                grad = normal(40, 37, seed=step, dtype=dtype)
                grad[torch.randperm(40, generator=torch.Generator().manual_seed(step))[:25]] = 0
                lazy_adam(*state, grad.to_sparse(1) if sparse else grad, **self.OPTIONS, step=step, seed=5)
        return state

    @pytest.mark.parametrize("sparse", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_equals_the_reference(self, dtype, sparse):
        found, expected = self.after("numba", dtype, sparse), self.after("reference", dtype, sparse)
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.dtype == theirs.dtype
            if dtype == torch.float32:
                assert_close(mine, theirs)
            else:  # the same random bits: sums of another order carry into another digit now and then
                assert_close(mine, theirs, rtol=2**-7, atol=1e-6)
                if mine.dtype == torch.bfloat16:
                    assert (mine == theirs).float().mean() > 0.98

    def test_equals_sparse_adam(self):
        table = normal(40, 37, seed=0)
        parameter = torch.nn.Parameter(table.clone())
        theirs = torch.optim.SparseAdam([parameter], **self.OPTIONS)
        state = [table, *new_moments(table)]
        for step in range(1, 6):
            ids = torch.randperm(40, generator=torch.Generator().manual_seed(step))[:11].sort().values
            grad = torch.sparse_coo_tensor(ids[None], normal(11, 37, seed=step), (40, 37), check_invariants=True)
            parameter.grad = grad.coalesce()
            theirs.step()
            with use("numba"):
                lazy_adam(*state, grad.coalesce(), **self.OPTIONS, step=step)
        assert_close(table, parameter.data)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_gradient_that_is_not_a_number_reaches_the_table(self, dtype):
        table = normal(4, 5, seed=0, dtype=dtype)
        grad = torch.zeros(4, 5, dtype=dtype)
        grad[2, 3] = float("nan")
        with use("numba"):
            lazy_adam(table, *new_moments(table), grad, **self.OPTIONS, step=1)
        assert table[2].isnan().any()
        assert table[[0, 1, 3]].isfinite().all()


class TestNumbers:
    def test_every_bfloat16_is_widened_and_ordered(self):
        every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)

        @simd.compiled
        def widened(numbers, out, places, back):
            for n in range(len(numbers)):
                out[n] = simd.wide(numbers[n])
                places[n] = simd.ordered(out[n])
                back[n] = simd.from_ordered(places[n])

        out, places, back = (np.empty(2**16, dtype) for dtype in (np.float32, np.int32, np.float32))
        widened(simd.array(every), out, places, back)
        assert_close(torch.from_numpy(out), every.float(), rtol=0, atol=0, equal_nan=True)
        assert_close(torch.from_numpy(back), every.float(), rtol=0, atol=0, equal_nan=True)
        numbers = torch.from_numpy(places.astype(np.int64))
        real = ~every.isnan()
        by_value = every.float()[real].sort(stable=True)
        assert (numbers[real][by_value.indices].diff() >= -1).all()  # -0 stands below 0
        assert (numbers[~real] == 2**31 - 1).all()

    def test_rounding_to_integers(self):
        x = torch.cat([normal(5_000, seed=0) * 100, torch.arange(-300, 300) / 2]).numpy()

        @simd.compiled
        def rounded(numbers, out):
            for n in range(len(numbers)):
                out[n] = simd.nearest(numbers[n])

        out = np.empty(len(x), np.int32)
        rounded(x, out)
        assert (out == np.rint(x)).all()

    def test_rounding_to_bfloat16_is_pytorchs(self):
        x = torch.cat(
            [normal(20_000, seed=0) * 10 ** normal(20_000, seed=1).mul(9), torch.tensor([0.0, -0.0, 1e39, -1e39])]
        )
        x = torch.cat([x, torch.tensor([float("nan"), 1.00390625, 1.01171875, 3.4e38])])

        @simd.compiled
        def rounded(numbers, out):
            for n in range(len(numbers)):
                out[n] = simd.to_bfloat16(numbers[n])

        out = torch.empty(len(x), dtype=torch.bfloat16)
        rounded(x.numpy(), simd.array(out))
        assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


class TestCompiling:
    def test_where_no_folder_can_be_written_code_is_compiled_anew(self, monkeypatch):
        def refuse(self) -> None:
            raise OSError("read-only")

        monkeypatch.setattr("numba.core.caching._CacheLocator.ensure_cache_path", refuse)

        def twice(x):
            return 2 * x

        assert simd.compiled(twice)(3) == 6

    def test_kept_code_is_that_of_these_sources(self, monkeypatch, tmp_path):
        def where() -> str:
            monkeypatch.setattr(simd, "_sources", simd.cache(simd._sources.__wrapped__))
            return simd.compiled(lambda x: x).stats.cache_path

        for path in simd.HERE.glob("*.py"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
        monkeypatch.setattr(simd, "HERE", tmp_path)
        before = where()
        assert where() == before
        with (tmp_path / "activations.py").open("a") as file:
            file.write("# changed")
        assert where() != before
        assert not simd.config.CACHE_DIR  # a user's own functions are kept where they were


class TestSegments:
    @quick
    @given(st.integers(0, 300), st.sampled_from([1, 2, 7, 2**11, 2**11 + 1, 2**22, 2**40]), st.integers(0, 2**31))
    def test_are_a_stable_sort(self, entries, rows, seed):
        ids = torch.randint(rows, (1, entries), generator=torch.Generator().manual_seed(seed))
        found = segments(ids, rows)
        ordered, order = ids.flatten().sort(stable=True)
        distinct, counts = ordered.unique_consecutive(return_counts=True)
        assert found.order_M.tolist() == order.tolist()
        assert found.ids_U.tolist() == distinct.tolist()
        assert np.diff(found.starts).tolist() == counts.tolist()

    @quick
    @given(st.integers(0, 200), st.integers(1, 50), st.integers(1, 9))
    def test_pieces_hold_every_segment_once(self, entries, rows, pieces):
        bounds = bounds_of_pieces(found := segments(torch.randint(rows, (1, entries)), rows), pieces)
        assert len(bounds) == pieces + 1
        assert bounds[0] == 0
        assert bounds[-1] == len(found.ids_U)
        assert (np.diff(bounds) >= 0).all()


class TestThreads:
    @quick
    @given(st.integers(0, 200), st.integers(1, 50), st.integers(1, 5))
    def test_ranges_cover_everything_once(self, count, grain, number):
        seen: list[int] = []
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(number)
            threads.in_parallel(lambda start, stop: seen.extend(range(start, stop)), count, grain=grain)
        finally:
            torch.set_num_threads(before)
        assert sorted(seen) == list(range(count))

    @pytest.mark.parametrize("bad", [0, 7])
    def test_an_error_reaches_the_caller(self, bad):
        def work(start: int, stop: int) -> None:
            if start <= bad < stop:
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            threads.in_parallel(work, 8, grain=1)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    def test_a_forked_process_has_threads_of_its_own(self):
        def square(start: int, stop: int, out: list[int]) -> None:
            out.extend(n * n for n in range(start, stop))

        out: list[int] = []
        threads.in_parallel(square, 8, out, grain=1)
        child = os.fork()
        if child == 0:
            mine: list[int] = []
            threads.in_parallel(square, 8, mine, grain=1)
            os._exit(0 if sorted(mine) == sorted(out) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class TestMemory:
    @pytest.fixture(autouse=True)
    def no_kept_blocks(self, monkeypatch):
        monkeypatch.setattr(memory, "_free", [])

    def test_freed_rows_are_used_again_and_live_ones_never(self):
        first = memory.new_tensor((1000, 500))
        place = first.data_ptr()
        second = memory.new_tensor((1000, 500))
        assert second.data_ptr() != place
        part = first[10:20]
        del first
        third = memory.new_tensor((1000, 500))
        assert third.data_ptr() != place  # a view holds it
        del part
        assert memory.new_tensor((1000, 490)).data_ptr() == place

    def test_an_array_may_be_freed_while_its_thread_takes_another(self):
        rows = memory.new_tensor((1000, 500))
        with memory._lock:  # as when the garbage collector runs there
            del rows
        assert len(memory._free) == 1

    def test_what_is_kept_is_bounded(self, monkeypatch):
        monkeypatch.setattr(memory, "KEPT", 10 * 2**20)
        rows = [memory.new_tensor((1000, 500)) for _ in range(30)]
        del rows
        assert 7 * 2**20 < sum(map(len, memory._free)) <= 10 * 2**20

    def test_rows_have_the_shape_and_dtype_asked_for(self):
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            for shape in ((0, 5), (3, 7), (4000, 300)):
                rows = memory.new_tensor(shape, dtype)
                assert (tuple(rows.shape), rows.dtype, rows.is_contiguous()) == (shape, dtype, True)
                rows.fill_(1)
