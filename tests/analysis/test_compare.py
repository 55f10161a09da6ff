import json
import math
from dataclasses import replace

import pytest
from run_folders import RECORDS, SESSION, make_run, perplexity, train_record, validation_record

from myriad.analysis.compare import load_contender, load_curve, summary, verdict
from myriad.config import MyriadError


@pytest.fixture
def pair(tmp_path):
    """Two contenders of equal cost with given bits per byte."""
    folders = make_run(tmp_path / "a"), make_run(tmp_path / "b")

    def make(a, b):
        bits = perplexity(a), perplexity(b)
        return [load_contender(*given, "test") for given in zip(folders, ("PEER", "dense"), bits, strict=True)]

    return make


def test_a_contender_is_what_its_folder_recorded(tmp_path):
    found = load_contender(make_run(tmp_path / "run"), "PEER", perplexity(2.0), "test")
    assert found.cost == found.run.model.cost()
    assert found.digest == found.run.digest()
    assert found.training_tokens == 5 * 64
    assert found.tokens_per_second == 300
    assert found.seconds == 2.5
    assert found.best_validation_loss == 1.5
    assert found.data_sha256 == SESSION["data"]["test"]
    record = json.loads(json.dumps(found.record()))
    assert record["bits_per_byte"] == pytest.approx(2.0)
    assert record["flops_per_token"] == found.cost.flops


def test_a_curve_has_the_losses_by_tokens(tmp_path):
    curve = load_curve(make_run(tmp_path / "run"), "PEER")
    assert curve.train_tokens == [64, 128, 192, 256, 320]
    assert curve.train_loss[:2] == [6.0, 3.0]
    assert curve.validation_tokens == [128, 256, 320]
    assert curve.validation_bits == [2.5, 1.25, 1.5]


def test_losses_that_are_not_finite_are_gaps(tmp_path):
    records = [train_record(1, None), train_record(2, 1.0), validation_record(2, None, None)]
    folder = make_run(tmp_path / "run", records=records)
    curve = load_curve(folder, "PEER")
    assert math.isnan(curve.train_loss[0])
    assert math.isnan(curve.validation_bits[0])
    assert load_contender(folder, "PEER", perplexity(2.0), "test").best_validation_loss is None


@pytest.mark.parametrize("records", [[], [train_record(1, 3.0)], [validation_record(1, 3.0, 2.0)]])
def test_hardly_any_records_are_enough(tmp_path, records):
    folder = make_run(tmp_path / "run", records=records, sessions=())
    found = load_contender(folder, "PEER", perplexity(2.0), "test")
    assert found.training_tokens == (64 if records and records[0]["kind"] == "train" else 0)
    assert found.data_sha256 is None
    assert len(load_curve(folder, "PEER").train_loss) <= 1


def test_a_torn_last_line_is_left_out(tmp_path):
    folder = make_run(tmp_path / "run")
    for name in ("sessions.jsonl", "metrics.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"kind": "tra')
    found = load_contender(folder, "PEER", perplexity(2.0), "test")
    assert found.sessions == [SESSION]
    assert found.training_tokens == 5 * 64


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(MyriadError, match=r"run\.json"):
        load_contender(tmp_path, "PEER", perplexity(2.0), "test")


def test_verdict_when_the_first_wins(pair):
    text = verdict(*pair(1.9, 2.0))
    assert text.startswith("PEER is better than dense on held-out text (test split): 1.9000 against 2.0000 bits")
    assert "0.1000 (5 %) lower" in text
    assert "equal FLOPs per token (ratio 1.000)" in text
    assert "equally many training tokens" in text
    assert "one seed each" in text


def test_verdict_when_the_first_loses(pair):
    text = verdict(*pair(2.5, 2.0))
    assert text.startswith("dense is better than PEER on held-out text (test split): 2.0000 against 2.5000 bits")
    assert "0.5000 (20 %) lower" in text


@pytest.mark.parametrize("bits", [(2.0, 2.0), (2.0, 2.009), (2.009, 2.0)])
def test_verdict_of_a_tie_names_no_winner(pair, bits):
    text = verdict(*pair(*bits))
    assert text.startswith("PEER and dense tie on held-out text (test split): ")
    assert "better" not in text
    assert f"{bits[0]:.4f} and {bits[1]:.4f} bits per byte" in text
    assert "one seed each" in text


def test_verdict_says_when_the_terms_are_unequal(tmp_path):
    wide = load_contender(make_run(tmp_path / "wide", d_hidden=512), "PEER", perplexity(1.9), "test")
    narrow = load_contender(
        make_run(tmp_path / "narrow", records=RECORDS[:3]), "dense", perplexity(2.0, context=8), "test"
    )
    text = verdict(wide, narrow)
    ratio = wide.cost.flops / narrow.cost.flops
    assert f"unequal FLOPs per token (PEER has {ratio:.3g} times those of dense)" in text
    assert "320 against 192 training tokens" in text
    assert "unequal contexts" in text


def test_texts_that_differ_are_not_compared(pair):
    a, b = pair(1.9, 2.0)
    assert "cannot be compared" in verdict(a, replace(b, split="validation"))
    other = replace(b, sessions=[SESSION | {"data": {"test": "b" * 64}}])
    assert "cannot be compared" in verdict(a, other)


@pytest.mark.parametrize("bits", [math.inf, math.nan])
def test_no_verdict_on_what_is_not_finite(pair, bits):
    assert verdict(*pair(bits, 2.0)) == "No verdict: the held-out loss of PEER is not finite."


def test_summary_sets_the_first_against_each_other(pair):
    a, b = pair(1.9, 2.0)
    assert summary([]) == []
    assert summary([a]) == ["PEER reaches 1.9000 bits per byte on held-out text (test split)."]
    assert summary([a, b, b]) == [verdict(a, b)] * 2
