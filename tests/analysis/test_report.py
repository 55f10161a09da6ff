import math

import numpy as np
import pytest
import torch
from page import Page
from run_folders import RECORDS, SESSION, make_run, perplexity, train_record

from myriad.analysis.compare import load_contender, load_curve, verdict
from myriad.analysis.report import (
    Sample,
    brief,
    describe_corpus,
    duration,
    number,
    percent,
    visible,
    whole,
    write_report,
)
from myriad.analysis.routing import LayerUsage
from myriad.data.prepare import Recipe, prepare

CORPUS = {
    "source": "python",
    "source_sha256": "c" * 64,
    "tokenizer_sha256": "d" * 64,
    "vocab_size": 8192,
    "splits": {"test": {"documents": 3, "tokens": 1234567, "words": 5, "bytes": 7, "sha256": "e" * 64}},
}


def layers():
    counts = torch.tensor([5, 0, 3, 1])
    return [LayerUsage("block 1", 9, counts, counts.double(), 9.0)]


def contender(folder, name="PEER", bits=1.9, **options):
    return load_contender(make_run(folder, **options), name, perplexity(bits), "test")


@pytest.fixture
def plain_figures(monkeypatch):
    """Saves the time of drawing where a test is not about the figures."""
    for name in ("loss_curves", "expert_usage"):
        monkeypatch.setattr(f"myriad.analysis.report.{name}", lambda content, **looks: b"a figure")


@pytest.fixture
def write(tmp_path):
    """Writes a report and parses it."""

    def write(**options):
        content = {"title": "A report", "contenders": [], "curves": [], "usages": {}, "samples": [], "commands": []}
        write_report(tmp_path / "report.html", **(content | {"corpus": CORPUS} | options))
        return Page((tmp_path / "report.html").read_text(encoding="utf-8"))

    return write


@pytest.fixture
def pair(tmp_path):
    return [contender(tmp_path / "a"), contender(tmp_path / "b", "dense", 2.0, seed=7)]


def test_a_whole_report(write, pair, tmp_path):
    page = write(
        contenders=pair,
        curves=[load_curve(tmp_path / "a", "PEER"), load_curve(tmp_path / "b", "dense")],
        usages={"PEER": layers(), "dense": []},
        samples=[Sample("PEER", "def f", "(x):\n    return x", "temperature 0.8, seed 0")],
        commands=["make demo"],
    )
    assert verdict(*pair) in page.text
    for part in ("make demo", pair[0].digest, "1,234,567", "e" * 64, "c" * 64, "(x):\n    return x", "block 1"):
        assert part in page.text
    for part in ("a processor, 2 cores", "float32", "reference", "torch 2.13.0", "2026-01-02T03:04:05Z", "d_hidden"):
        assert part in page.text
    assert len(page.alts) == 2
    assert all(len(alt) > 20 for alt in page.alts)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["report.html"]


def test_nothing_is_fetched_and_nothing_runs(write, pair):
    page = write(contenders=pair, usages={"PEER": layers()})
    page.assert_self_contained()


@pytest.mark.usefixtures("plain_figures")
def test_samples_are_text_and_not_markup(write):
    nasty = "</pre><script>alert(1)</script>&amp; <b>\n\n  'x' \"y\""
    page = write(samples=[Sample("<i>m</i>", nasty, nasty, nasty)], title="<script>", commands=["a && b > 'c'"])
    assert "script" not in page.tags
    assert "i" not in page.tags
    assert page.text.count(nasty) == 3
    assert "a && b > 'c'" in page.text


@pytest.mark.usefixtures("plain_figures")
def test_a_sample_keeps_its_space_and_shows_control_characters(write):
    page = write(samples=[Sample("PEER", "\n\t  x\n", "\r\x00\x1b\ud800 end\n", "greedy")])
    assert "\n\t  x\n␍␀␛? end\n" in page.text


@pytest.mark.usefixtures("plain_figures")
def test_a_report_on_one_run_has_no_opponent(write, tmp_path):
    page = write(contenders=[contender(tmp_path / "a")])
    assert "PEER reaches 1.9000 bits per byte" in page.text
    assert "better" not in page.text.replace("Lower is better", "")


@pytest.mark.parametrize(
    "records", [[], [train_record(1, None)], [record for record in RECORDS if record["kind"] == "train"]]
)
def test_runs_that_recorded_little(write, tmp_path, records):
    run = contender(tmp_path / "a", records=records, sessions=(), bits=math.inf)
    page = write(contenders=[run], curves=[load_curve(tmp_path / "a", "PEER")])
    assert "–" in page.text


@pytest.mark.usefixtures("plain_figures")
def test_sessions_on_unequal_machines_are_all_named(write, tmp_path):
    page = write(contenders=[contender(tmp_path / "a", sessions=(SESSION, SESSION | {"device": "another"}))])
    assert "a processor, 2 cores; another" in page.text


@pytest.mark.usefixtures("plain_figures")
def test_what_all_runs_have_in_common_is_said_once(write, pair):
    text = write(contenders=pair).text
    assert [text.count(each) for each in ("a processor, 2 cores", pair[0].digest, pair[1].digest)] == [1, 1, 1]


def test_the_corpus_is_described_by_its_store(tmp_path):
    (tmp_path / "text").mkdir()
    for index in range(40):
        (tmp_path / "text" / f"{index}.txt").write_text(f"some words of document {index}\n" * 3)
    store = prepare(Recipe(source=tmp_path / "text", tokenizer="bytes"), tmp_path / "store")
    corpus = describe_corpus(store)
    assert corpus.keys() == CORPUS.keys()
    assert corpus["splits"]["train"].keys() == CORPUS["splits"]["test"].keys()
    assert corpus["splits"]["train"]["tokens"] == len(store.split("train").tokens)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.23456, "1.235"),
        (0.0123456, "0.01235"),
        (999.96, "1,000"),
        (123.456, "123.5"),
        (23456.7, "23,457"),
        (143036713.7, "1.430 × 10⁸"),
        (3.2e15, "3.200 × 10¹⁵"),
        (1e-7, "1.000 × 10⁻⁷"),
        (-0.5, "-0.5000"),
        (np.float64(2.5), "2.500"),
        (None, "–"),
        (math.inf, "–"),
        (math.nan, "–"),
    ],
)
def test_numbers_have_four_digits(value, text):
    assert number(value) == text


def test_other_forms():
    assert [whole(value) for value in (None, 0, 1234567, 1234.6)] == ["–", "0", "1,234,567", "1,235"]
    assert [brief(value) for value in (0.12345, 4.02, 9.876, 12.34, 1234.5)] == ["0.12", "4.0", "9.9", "12", "1,234"]
    assert [percent(share) for share in (0, 1e-5, 0.123456, 0.99999, 1)] == [
        "0.0 %",
        "< 0.1 %",
        "12.3 %",
        "> 99.9 %",
        "100.0 %",
    ]
    assert [duration(seconds) for seconds in (None, 3.4, 61, 3600, 7384)] == [
        "–",
        "3 s",
        "1 min 1 s",
        "1 h 0 min",
        "2 h 3 min",
    ]
    assert visible("a\tb\n\x07\x7f") == "a\tb\n␇␡"
