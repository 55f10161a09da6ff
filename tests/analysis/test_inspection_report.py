import json
from dataclasses import replace

import pytest
import torch
from page import Page

from myriad.analysis import inspection_report
from myriad.analysis.heads import HeadTally
from myriad.analysis.inspection import Inspection, LayerRouting
from myriad.analysis.inspection_report import describe, write_inspection
from myriad.analysis.routing import UsageTally
from myriad.analysis.specialties import Specialty, TokenShare
from myriad.config import RunError
from myriad.ffn import Routing

FILES = ["entropy.png", "overlap.png", "report.html", "routing.json", "usage.png", "weights.png"]
FIGURES = ("expert_usage", "weight_by_rank", "router_entropy", "head_overlap")


def layer(heads=2, experts=40, name="block 0"):
    random = torch.Generator().manual_seed(heads)
    ids = torch.rand(50, heads, experts, generator=random).topk(3).indices.flatten(1)
    routing = Routing(ids, torch.rand(ids.shape, generator=random), experts, heads)
    usage, choices = UsageTally(experts), HeadTally.of(routing)
    usage.add(routing, 50)
    choices.add(routing)
    top = [Specialty(5, 0.25, [TokenShare(0, 0.5, 12.3), TokenShare(1, 0.0001, 1.234)]), Specialty(6, 0.1, [])]
    return LayerRouting(usage.finish(name), choices.finish(name), top)


def inspection(*layers, words=("</code><script>", "\n  \ud800")):
    return Inspection(
        run="runs/<i>a",
        checkpoint="00000200",
        config="c0ffee",
        run_seed=7,
        split="validation",
        data_sha256="e" * 64,
        tokens=50,
        context=10,
        seed=3,
        layers=list(layers),
        device="a processor, 2 cores",
        words=dict(enumerate(words)),
    )


@pytest.fixture
def plain_figures(monkeypatch):
    """Saves the time of drawing where a test is not about the figures."""
    for name in FIGURES:
        monkeypatch.setattr(inspection_report, name, _draw_nothing)


def _draw_nothing(content, path=None, **looks):
    if path is not None:
        path.write_bytes(b"a figure")
    return b"a figure"


def test_a_whole_report(tmp_path):
    found = inspection(layer(), layer(heads=1, name="block 1.0"))
    write_inspection(tmp_path / "new" / "out", found, "myriad inspect runs/a")
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == FILES
    page = Page((tmp_path / "new" / "out" / "report.html").read_text(encoding="utf-8"))
    page.assert_self_contained()
    assert describe(found) in page.text
    for part in (
        "block 0",
        "block 1.0",
        "00000200",
        "c0ffee",
        "e" * 64,
        "a processor, 2 cores",
        "myriad inspect runs/a",
    ):
        assert part in page.text
    assert len(page.alts) == 4
    assert all(len(alt) > 20 for alt in page.alts)
    figures = json.loads((tmp_path / "new" / "out" / "routing.json").read_text())
    assert figures == json.loads(json.dumps(found.record())) | {"command": "myriad inspect runs/a"}


@pytest.mark.usefixtures("plain_figures")
def test_tokens_are_text_and_not_markup(tmp_path):
    write_inspection(tmp_path, inspection(layer()), "a && b > 'c'")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "'</code><script>'" in page.text
    assert r"'\n  \ud800'" in page.text
    assert "runs/<i>a" in page.text
    assert "a && b > 'c'" in page.text
    assert "script" not in page.tags


@pytest.mark.usefixtures("plain_figures")
def test_without_several_heads_nothing_is_said_of_their_overlap(tmp_path):
    for heads in (1, 2):
        write_inspection(tmp_path, inspection(layer(heads)), "")
        text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
        assert ("Overlap of heads" in text) == (heads == 2)


@pytest.mark.usefixtures("plain_figures")
def test_a_folder_that_says_nothing_of_its_run(tmp_path):
    write_inspection(tmp_path, replace(inspection(layer()), checkpoint=None, config=None, run_seed=None), "")
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "None" not in text
    assert "Checkpoint" not in text


def test_the_sentence_names_the_range_over_layers():
    one, other = layer(), layer(heads=1)
    sentence = describe(inspection(one, other))
    assert "the 2 routed layers use" in sentence
    assert f"{100 * other.usage.share_used:.1f} % to {100 * one.usage.share_used:.1f} %" in sentence
    assert "the routed layer uses 100.0 % of its experts" in describe(inspection(one))


def test_a_folder_that_cannot_be_written_is_one_fault(tmp_path):
    (tmp_path / "file").write_text("dear")
    with pytest.raises(RunError, match="file: cannot be written"):
        write_inspection(tmp_path / "file", inspection(layer()), "")
