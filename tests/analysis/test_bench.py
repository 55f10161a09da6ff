"""The benchmark: what it counts is counted by hand here, and a small run has every figure."""

import gc

import pytest
import torch

from myriad import kernels
from myriad.analysis.bench import BenchConfig, Measurement, ModelShape, Report, Spread, bounds, memory, peak, run_bench
from myriad.analysis.bench import case as cases
from myriad.analysis.bench import model as models
from myriad.analysis.bench.bounds import Batch, Phase
from myriad.analysis.bench.peer_pytorch import ABSENT, installed, with_their_layers
from myriad.analysis.bench.rates import measure_rates
from myriad.analysis.bench.report import BASE, OURS, THEIRS, Contender, Rates, compared, paired_ratio, with_growth
from myriad.analysis.bench.timing import interleaved
from myriad.ffn import PEERConfig, StackConfig
from myriad.kernels.table_gradient import sparse_gradient
from myriad.models import TransformerConfig

CPU = torch.device("cpu")
ELSEWHERE = peak.measured_elsewhere
SETTINGS = BenchConfig(
    sides=(8, 16),
    tokens=16,
    d_model=16,
    heads=2,
    experts_per_head=3,
    d_key=4,
    decoded=2,
    generated=3,
    repeats=2,
    warmup=1,
    megabytes=1,
    matrix=64,
    kernels="reference",
)
RATES = Rates(copy_bytes=100, read_bytes=50, gather_bytes=20, float32_flops=10, bfloat16_flops=40)

needs_peer_pytorch = pytest.mark.skipif(not installed(), reason=f"PEER-pytorch {ABSENT}")


def small_model(**options) -> TransformerConfig:
    ffns = {"peer": SETTINGS.layer(8)}
    sizes = {"vocab_size": 32, "context": 16, "layers": 2, "d_model": 16, "heads": 2}
    return TransformerConfig(**{**sizes, "ffns": ffns, "pattern": ["peer"], **options})


def small_shape(**options) -> ModelShape:
    return ModelShape(
        **{"name": "small", "model": small_model(), "sequences": 2, "length": 8, "decode": True, **options}
    )


@pytest.fixture(scope="module", autouse=True)
def _in_this_process():
    """Peak memory, too: a process for each takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peak, "measured_elsewhere", peak.measure)
        yield


@pytest.fixture(scope="module")
def report(_in_this_process) -> Report:
    return run_bench(SETTINGS, [small_shape()])


# What is counted


COUNTED = PEERConfig(experts=16, heads=2, experts_per_head=2, d_key=4, shared_keys=False, query_norm="none")
BATCH = Batch(tokens=3, distinct=5)


def test_the_products_of_a_layer_are_those_counted_by_hand():
    assert bounds.query_flops(COUNTED, 8, BATCH) == 2 * 3 * 8 * 16  # 3 tokens, 8 wide, to 2 heads x 2 halves x 4
    assert bounds.score_flops(COUNTED, BATCH) == 2 * 12 * 4 * 4  # 12 halves of queries, 4 sub-keys, 4 wide
    assert bounds.lookup_flops(COUNTED, 8, BATCH) == 2 * 2 * 12 * 8  # 12 uses of an expert, 2 tables, 8 wide
    assert bounds.row_bytes(COUNTED, 8, BATCH) == 2 * 5 * 8 * 4  # 2 tables, 5 rows, 8 wide, 4 bytes


def test_the_forward_products_are_the_layers_cost():
    one = Batch(tokens=1, distinct=4)
    assert sum(phase.flops for phase in bounds.forward_phases(COUNTED, 8, one)) == COUNTED.cost(8).flops


def test_a_step_moves_every_row_ten_times():
    """Read in forward and backward; gradient written and read; row and both moments read and written."""
    phases = bounds.step_phases(COUNTED, 8, BATCH)
    assert sum(phase.bytes for phase in phases) == 10 * 320
    winners = 8 * 12 * 4  # 12 winners, 2 halves, a product for the query and one for the key, 4 wide
    assert sum(phase.flops for phase in phases) == 3 * 768 + 384 + 3 * 384 + winners


def test_gated_experts_have_a_third_table():
    gated = COUNTED.model_copy(update={"gated": True})
    assert 2 * bounds.row_bytes(gated, 8, BATCH) == 3 * bounds.row_bytes(COUNTED, 8, BATCH)
    assert 2 * bounds.lookup_flops(gated, 8, BATCH) == 3 * bounds.lookup_flops(COUNTED, 8, BATCH)


def test_the_rest_of_a_model_counts_three_times_its_forward():
    layers, peer = [COUNTED, COUNTED], 2 * COUNTED.cost(8).flops
    rest, *others = bounds.model_step_phases(3, peer + 1000, layers, 8, [BATCH, BATCH])
    assert rest == Phase(bytes=0, flops=3 * 3 * 1000)
    assert others == 2 * bounds.step_phases(COUNTED, 8, BATCH)


def test_a_phase_lasts_as_long_as_the_slower_of_memory_and_arithmetic():
    phases = [Phase(bytes=200, flops=10), Phase(bytes=100, flops=80)]
    assert bounds.seconds(phases, RATES, "float32") == 200 / 100 + 80 / 10
    assert bounds.seconds(phases, RATES, "bfloat16") == 200 / 100 + 80 / 40
    slow = RATES.model_copy(update={"bfloat16_flops": 1.0})  # emulated: float32 is the better way
    assert slow.flops("bfloat16") == 10


def test_rates_are_positive():
    rates = measure_rates(1, 32, CPU)
    assert all(rate > 0 for rate in rates.model_dump().values())
    assert rates.bytes == max(rates.copy_bytes, rates.read_bytes, rates.gather_bytes)


def test_the_shape_of_a_model_knows_the_layers_in_its_stacks():
    layer = SETTINGS.layer(8)
    stacked = small_model(
        layers=3, ffns={"peer": layer, "two": StackConfig(layers=[layer] * 2)}, pattern=["two", "peer"]
    )
    assert len(small_shape(model=stacked).peer_layers()) == 2 + 1 + 2


# Statistics


def test_a_spread_is_median_and_quartiles():
    assert Spread.of([5, 1, 4, 2, 3]) == Spread(median=3, low=2, high=4, runs=5)
    assert Spread.of([7]) == Spread(median=7, low=7, high=7, runs=1)


def test_a_ratio_is_of_pairs_and_not_of_medians():
    ratio = paired_ratio([10, 20, 90], [10, 40, 30])
    assert ratio is not None
    assert ratio.median == 1  # of 1, 0.5 and 3; the medians' would be 20 / 30
    assert paired_ratio(None, [1]) is None


def test_times_and_rates_are_put_in_their_units():
    mine = Contender(OURS, "float32")
    amounts = {BASE: [4.0, 4.0], mine: [2.0, 2.0]}
    _, ours = compared("layer forward", "8x8", amounts, "ms", scale=1e3, bounds={"float32": 1.0})
    assert (ours.value.median, ours.bound, ours.ratio.median) == (2000, 1000, 2)
    _, ours = compared("model training", "small", amounts, "tokens/s", scale=8, bounds={"float32": 1.0})
    assert (ours.value.median, ours.bound, ours.ratio.median) == (4, 8, 2)


def test_growth_is_over_the_smallest_size():
    def one(shape: str, median: float) -> Measurement:
        spread = Spread.of([median])
        return Measurement(what="layer forward", shape=shape, who=OURS, precision="float32", unit="ms", value=spread)

    assert [found.growth for found in with_growth([one("8x8", 2), one("16x16", 3)])] == [1, 1.5]


def test_runs_take_turns_after_the_warm_up():
    seen = []
    seconds = interleaved({name: lambda name=name: seen.append(name) for name in "AB"}, repeats=3, warmup=2, device=CPU)
    assert "".join(seen) == "AABB" + "AABB" * 3
    assert {name: len(found) for name, found in seconds.items()} == {"A": 3, "B": 3}
    assert all(second >= 0 for found in seconds.values() for second in found)
    assert gc.isenabled()


def test_a_difference_is_that_of_the_worst_tensor():
    expected = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([100.0])}
    found = cases.difference({"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([99.0])}, expected)
    assert found.largest == 1
    assert found.relative == pytest.approx(0.1)


@pytest.mark.parametrize("dense", [False, True])
def test_a_difference_of_sparse_gradients_sees_every_row(dense):
    def sparse(rows: list[int], values: list[float]) -> torch.Tensor:
        return torch.sparse_coo_tensor([rows], torch.tensor(values).unsqueeze(1), (4, 1), check_invariants=True)

    expected, found = sparse([0, 2], [3.0, 4.0]), sparse([1, 2], [2.0, 4.0])
    if dense:
        found = found.to_dense()
    apart = cases.difference({"table": found}, {"table": expected})
    assert apart.largest == 3
    assert apart.relative == pytest.approx(13**0.5 / 5)


# Memory


needs_peaks = pytest.mark.skipif(not memory.tells_peak(CPU), reason=peak.NOT_TOLD)


@needs_peaks
def test_the_peak_of_a_run_is_what_it_took_and_gave_back():
    def run() -> None:
        torch.ones(64 * 2**20 // 4)

    run()
    taken = memory.peak_bytes(run, CPU) - memory.held_bytes(CPU)
    assert 64e6 < taken < 90e6


@needs_peaks
def test_pages_that_were_never_touched_are_not_there():
    tensor = torch.empty(64 * 2**20, dtype=torch.uint8)
    tensor[: 16 * 2**20] = 1
    assert 15 * 2**20 < memory.resident_bytes([tensor]) < 24 * 2**20  # pages may be large
    assert memory.resident_bytes([torch.ones(3)]) == 0


@needs_peaks
def test_the_peak_of_a_step_holds_gradients_and_neither_weights_nor_moments():
    settings = SETTINGS.model_copy(update={"d_model": 256, "tokens": 1024})
    tables = 2 * 64**2 * 256 * 4
    assert not sparse_gradient(1024, 2 * 3, 64**2)
    peaks = peak.measure(settings, 64, OURS)
    assert len(peaks) == peak.RUNS
    # The gradients are as large as the tables; weights and moments would be three times that.
    assert all(tables < one < 2.9 * tables for one in peaks)


@needs_peaks
def test_a_process_of_its_own_measures_and_says_why_it_cannot():
    found = ELSEWHERE(SETTINGS, 8, OURS)
    assert len(found) == peak.RUNS
    assert all(one >= 0 for one in found)
    assert "code 1" in ELSEWHERE(SETTINGS, 8, "nobody")


def test_a_system_that_does_not_tell_has_no_peak(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "PROCESS", tmp_path / "none")
    found = list(peak.peak_memory(SETTINGS, 8, CPU))
    assert found
    assert all(one.value is None and one.missing for one in found)


def test_the_free_memory_is_a_number_of_bytes_where_the_system_tells():
    free = memory.available_bytes(CPU)
    assert free is None or 2**20 < free < 2**50


def test_what_does_not_fit_is_named(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 3_000_000_000)
    assert memory.lack(2e9, CPU) is None
    assert memory.lack(12e9, CPU) == "skipped: needs 12.0 GB, 3.0 GB are free"
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)
    assert memory.lack(1e30, CPU) is None


# A whole run


def found_in(report: Report) -> dict[tuple[str, str, str, str], Measurement]:
    return {(one.what, one.shape, one.who, one.precision): one for one in report.measurements}


def test_every_figure_is_there(report):
    found = found_in(report)
    for what in ("layer forward", "layer training step", "layer peak memory", "layer decode"):
        for shape in ("8x8", "16x16"):
            assert found[what, shape, OURS, "float32"].value is not None
    for what in ("model training", "model decode"):
        assert found[what, "small", OURS, "float32"].value is not None
    if installed():
        assert {key[:2] for key in found if key[2] == THEIRS} == {key[:2] for key in found if key[2] == OURS}
    assert report.kernels["product_key"].startswith("reference")
    assert report.versions["torch"] == torch.__version__


def test_no_figure_is_better_than_its_bound(report):
    for one in report.measurements:
        if one.value is not None and one.bound is not None:
            better = one.value.median > one.bound if one.unit == "tokens/s" else one.value.median < one.bound
            assert not better, one


def test_the_reference_differs_from_itself_by_nothing_and_theirs_by_rounding(report):
    for one in report.measurements:
        if one.difference is not None and one.precision == "float32":
            assert one.difference.relative <= (0 if one.who == OURS else 1e-5), one


def test_the_report_survives_json(report):
    again = Report.model_validate_json(report.model_dump_json())
    assert again == report
    assert BenchConfig.model_validate(again.settings) == SETTINGS


def test_only_the_parts_that_are_asked_for_are_measured():
    settings = SETTINGS.model_copy(update={"parts": ("decode",), "sides": (8,)})
    report = run_bench(settings, [small_shape()])
    assert {one.what for one in report.measurements} == {"layer decode"}
    assert report.models == []


def test_large_sizes_are_not_trained():
    settings = SETTINGS.model_copy(update={"parts": ("forward", "step"), "largest_trained": 8})
    found = found_in(run_bench(settings, []))
    assert {shape for what, shape, *_ in found if what == "layer training step"} == {"8x8"}
    assert {shape for what, shape, *_ in found if what == "layer forward"} == {"8x8", "16x16"}


def test_without_peer_pytorch_everything_else_runs(monkeypatch):
    monkeypatch.setattr("myriad.analysis.bench.peer_pytorch.installed", lambda: False)
    settings = SETTINGS.model_copy(update={"sides": (8,)})
    for one in run_bench(settings, [small_shape()]).measurements:
        assert (one.value is None) == (one.who == THEIRS)
        assert one.missing == (ABSENT if one.who == THEIRS else None)
        assert one.ratio is None


def test_nothing_is_tried_that_the_memory_does_not_hold(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1000)
    found = run_bench(SETTINGS, [small_shape()]).measurements
    assert found
    assert all(one.value is None and one.missing.startswith("skipped: needs ") for one in found)


@needs_peer_pytorch
def test_theirs_is_left_out_where_only_ours_fits(monkeypatch):
    settings = SETTINGS.model_copy(update={"parts": ("step",), "sides": (8,)})
    monkeypatch.setattr(memory, "available_bytes", lambda device: 100_000)
    found = found_in(run_bench(settings, []))
    assert found["layer training step", "8x8", THEIRS, "float32"].missing
    assert found["layer training step", "8x8", OURS, "float32"].value


@needs_peer_pytorch
def test_models_that_do_not_fit_together_run_one_after_the_other(monkeypatch):
    shape = small_shape()
    most = max(models.needed_bytes(shape, who) for who in (OURS, THEIRS))
    monkeypatch.setattr(memory, "available_bytes", lambda device: most)
    settings = SETTINGS.model_copy(update={"parts": ("model",)})
    found = run_bench(settings, [shape]).measurements
    assert {one.who for one in found} == {OURS, THEIRS}
    assert all(one.value is not None and not one.in_turns for one in found)


# Models


@needs_peer_pytorch
def test_a_model_with_their_layers_computes_the_same():
    torch.manual_seed(0)
    stack = StackConfig(layers=[SETTINGS.layer(8), SETTINGS.layer(8)])
    model = small_model(ffns={"two": stack}, pattern=["two"]).build().eval()
    ids = torch.randint(32, (2, 9))
    with torch.no_grad(), kernels.use("reference"):
        expected = model(ids).logits
        torch.testing.assert_close(with_their_layers(model)(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert not any("experts_down" in name for name, _ in model.named_parameters())


def test_generation_with_a_cache_is_that_without():
    torch.manual_seed(0)
    model = small_model().build().eval()
    with kernels.use("reference"):
        ids = models.generate(model, torch.tensor([[3]]), 6)
        assert ids.shape == (1, 7)
        with torch.no_grad():
            best = model(ids[:, :-1]).logits.argmax(dim=-1)
    assert torch.equal(best, ids[:, 1:])
