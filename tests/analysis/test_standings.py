"""Means over seeds and their spread, what is said of them, and how they are written down."""

import csv
import json
import math
from types import SimpleNamespace

import pytest
from run_folders import make_run, perplexity

from myriad.analysis.compare import load_contender, verdict
from myriad.analysis.compare.plan import Budget
from myriad.analysis.compare.standings import Spread, Standing, Standings, standing_verdict, verdicts
from myriad.analysis.compare.tables import columns, rows, short, spread, to_csv, to_json, to_markdown
from myriad.ffn import Cost

BUDGET = Budget.parse("1e9flops")


@pytest.fixture
def standing(tmp_path):
    """Makes a contender with given bits per byte, a seed each."""

    def make(name, bits, budget=BUDGET, diverged=(), multiplier=1.0, **options):
        runs = []
        for seed, value in enumerate(bits):
            folder = make_run(tmp_path / f"{name}-{budget}-{seed}", seed=seed, **options)
            runs.append(load_contender(folder, name, perplexity(value), "test"))
        cost = runs[0].cost if runs else Cost(1, 1, 1, 1)
        return Standing(name, budget, multiplier, cost, 320, runs, dict.fromkeys(diverged, "broke"))

    return make


CONDUCTED = SimpleNamespace(
    plan=SimpleNamespace(seeds=2, digest=lambda: "f" * 12, contenders={}),
    store=SimpleNamespace(split=lambda name: SimpleNamespace(sha256="a" * 64)),
    split="test",
    sweep=[],
    multipliers={},
    at_a_time=1,
)


def test_a_spread_is_the_mean_and_the_deviation_over_seeds():
    assert Spread.of([1.0, 2.0, 3.0]) == Spread(2.0, 1.0)
    assert Spread.of([2.5]) == Spread(2.5, None)
    assert Spread.of([]) is None
    assert str(Spread(2.0, 0.12345)) == "2.0000 ± 0.1235"


def test_a_standing_sums_its_runs_up(standing):
    one = standing("PEER", [2.0, 2.2])
    assert one.bits_per_byte.mean == pytest.approx(2.1)
    assert one.bits_per_byte.deviation == pytest.approx(math.sqrt(0.02))
    assert one.tokens_per_second == 300
    assert one.training_flops == 3 * one.cost.flops * 320


def test_a_difference_is_taken_seed_by_seed(standing):
    found = standing("PEER", [2.0, 3.0]).relative_to(standing("dense", [1.0, 2.0, 4.0]))
    assert found.mean == pytest.approx((100 + 50) / 2)
    assert found.deviation == pytest.approx(50 / math.sqrt(2))
    assert standing("other", []).relative_to(standing("none", [1.0])) is None


@pytest.mark.parametrize(
    ("mine", "theirs", "words"),
    [
        (
            [1.90, 1.92],
            [2.00, 2.02],
            "PEER is better than dense on held-out text (test split): 1.9100 ± 0.0141",
        ),
        ([2.00, 2.02], [1.90, 1.92], "dense is better than PEER on held-out text"),
        ([1.80, 2.02], [2.00, 2.02], "PEER and dense are not told apart on held-out text"),
        ([2.00, 2.02], [2.005, 2.025], "PEER and dense tie on held-out text"),
    ],
)
def test_a_verdict_weighs_the_difference_against_the_spread(standing, mine, theirs, words):
    text = standing_verdict(standing("PEER", mine), standing("dense", theirs))
    assert text.startswith(words)
    assert "over 2 seeds" in text
    assert "equal FLOPs per token (ratio 1.000), equally many training tokens" in text


def test_one_seed_is_called_one_seed(standing):
    a, b = standing("PEER", [1.9]), standing("dense", [2.0])
    assert standing_verdict(a, b) == verdict(a.runs[0], b.runs[0])
    assert "one seed each" in standing_verdict(a, b)


def test_no_verdict_where_a_run_diverged(standing):
    text = standing_verdict(standing("PEER", [1.9], diverged=[1]), standing("dense", [2.0, 2.1]))
    assert text == "No verdict on PEER and dense: 1 of PEER's runs diverged."
    everything = Standings("other", [standing("lost", [], diverged=[0]), standing("other", [2.2])])
    assert list(verdicts(everything)) == ["No verdict on lost and other: 1 of lost's runs diverged."]
    assert rows(everything)[0][-2:] == ["–", "1 of 1"]


@pytest.fixture
def standings(standing):
    other = Budget.parse("2e9flops")
    return Standings(
        "dense",
        [
            standing("PEER", [1.9, 1.92]),
            standing("dense", [2.0, 2.02], d_hidden=80),
            standing("PEER", [1.8, 1.82], other, multiplier=2.0),
            standing("dense", [1.7, 1.72], other, d_hidden=80),
        ],
    )


def test_each_budget_has_its_own_verdicts(standings):
    first, second = verdicts(standings)
    assert first.startswith("1e9flops: PEER is better than dense")
    assert second.startswith("2e9flops: dense is better than PEER")


def test_the_table_has_a_row_for_each_contender_and_budget(standings):
    heads = [column.heading for column in columns(standings)]
    cells = rows(standings)
    assert [row[:2] for row in cells] == [[one.name, str(one.budget)] for one in standings.all]
    assert all(len(row) == len(heads) for row in cells)
    assert cells[0][heads.index("bits per byte")] == "1.9100 ± 0.0141"
    assert cells[0][heads.index("vs dense")].startswith("-4.98 ± 0.0")
    assert cells[1][heads.index("vs dense")] == "–"
    assert cells[2][heads.index("LR")] == "x2"
    assert cells[0][heads.index("routing")] == "–"


def test_markdown_says_what_the_figures_are(standings):
    text = to_markdown(standings, CONDUCTED)
    lines = text.splitlines()
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert sum(line.startswith("| ") for line in lines) == 2 + 4
    assert "test split (aaaaaaaaaaaa)" in text
    assert "2 seeds; mean ± standard deviation" in text


def test_files_for_programs_hold_unrounded_figures(standings):
    found = list(csv.DictReader(to_csv(standings).splitlines()))
    assert len(found) == 4
    assert float(found[0]["bits_per_byte"]) == standings.all[0].bits_per_byte.mean
    content = json.loads(to_json(standings, CONDUCTED, "myriad compare a b"))
    assert content["command"] == "myriad compare a b"
    assert len(content["runs"]) == 8
    assert {run["seed"] for run in content["runs"]} == {0, 1}
    assert content["standings"][0]["percent_above_reference"] < 0


def test_counts_and_spreads_are_short():
    assert [short(count) for count in (7, 999, 1000, 7_880_000, 999_700_000, 3.2e15)] == [
        "7",
        "999",
        "1 k",
        "7.88 M",
        "1,000 M",
        "3.2 P",
    ]
    assert spread(Spread(1.5, 0.25), 2, "+", " %") == "+1.50 ± 0.25 %"
    assert spread(Spread(-1.5, None), 1) == "-1.5"
    assert spread(None, 2) == spread(Spread(math.inf, None), 2) == "–"
