"""`myriad bench`: tables on stdout, progress on stderr, a file of figures, and one line for what cannot be."""

import json

import pytest

from myriad.analysis.bench import BenchConfig, Report, peak

QUICK = ["--quick", "--kernels", "reference", "--repeats", 2]


@pytest.fixture(autouse=True)
def _smaller(monkeypatch):
    """`--quick`, quicker, and in this process."""
    sizes = {"tokens": 16, "d_model": 16, "heads": 2, "experts_per_head": 3, "d_key": 4, "megabytes": 1, "matrix": 64}
    tiny = BenchConfig.quick().model_copy(update={"sides": (8, 16), "decoded": 2, "generated": 2, **sizes})
    monkeypatch.setattr(BenchConfig, "quick", classmethod(lambda cls: tiny))
    monkeypatch.setattr(peak, "measured_elsewhere", peak.measure)


def test_a_quick_run_prints_tables_and_writes_its_figures(myriad, tmp_path):
    out = tmp_path / "new" / "figures.json"
    result = myriad("bench", *QUICK, "--out", out)
    assert result.code == 0, result.err
    for title in ("layer forward, ms", "layer training step, ms", "layer peak memory, MB", "model decode, tokens/s"):
        assert title in result.out
    for word in ("8x8", "16x16", "small", "PEER-pytorch", "bound", "GFLOP/s", "kernels: ", str(out)):
        assert word in result.out
    assert "layer training step, 16x16 experts" in result.err
    assert "Traceback" not in result.err
    report = Report.model_validate_json(out.read_text())
    assert {one.what.split()[0] for one in report.measurements} == {"layer", "model"}
    assert all(one.value.runs == 2 for one in report.measurements if one.value and one.unit == "ms")


def test_parts_and_sizes_can_be_chosen(myriad, tmp_path):
    out = tmp_path / "figures.json"
    result = myriad("bench", *QUICK, "--only", "decode,forward", "--experts", "9,4", "--out", out)
    assert result.code == 0, result.err
    measured = json.loads(out.read_text())["measurements"]
    assert {one["what"] for one in measured} == {"layer forward", "layer decode"}
    assert list(dict.fromkeys(one["shape"] for one in measured)) == ["4x4", "9x9"]


def test_layer_means_all_parts_of_it(myriad, tmp_path):
    out = tmp_path / "figures.json"
    assert myriad("bench", *QUICK, "--only", "layer", "--experts", "4", "--out", out).code == 0
    found = {one["what"] for one in json.loads(out.read_text())["measurements"]}
    assert found == {"layer forward", "layer decode", "layer training step", "layer peak memory"}


def test_without_peer_pytorch_the_table_says_so(myriad, tmp_path, monkeypatch):
    monkeypatch.setattr("myriad.analysis.bench.peer_pytorch.installed", lambda: False)
    result = myriad("bench", *QUICK, "--only", "forward", "--out", tmp_path / "figures.json")
    assert result.code == 0, result.err
    assert "not installed: pip install 'myriad-moe[bench]'" in result.out


BAD = {
    "an unknown part": (["--only", "laier"], "--only: unknown part 'laier'; did you mean 'layer'?"),
    "no part": (["--only", ""], "--only: unknown part ''"),
    "a size that is no number": (["--experts", "256,big"], "--experts: expected sides from 1 to 16384"),
    "a size of nothing": (["--experts", "0"], "found '0'"),
    "a size that nothing holds": (["--experts", "99999999"], "found '99999999'"),
    "too few runs": (["--repeats", "0"], "repeats: "),
    "unknown kernels": (["--kernels", "refrence"], "kernels 'refrence' are not available; did you mean 'reference'?"),
    "a folder to write to": (["--out", "."], "--out: . cannot be written"),
}


@pytest.mark.parametrize(("words", "fault"), BAD.values(), ids=BAD.keys())
def test_bad_options_are_one_clear_line(myriad, tmp_path, monkeypatch, words, fault):
    monkeypatch.chdir(tmp_path)
    result = myriad("bench", "--quick", *words)
    assert result.code == 2
    assert fault in result.err
    assert len(result.err.splitlines()) == 1
    assert result.err.startswith("myriad: ")
    assert result.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_full_machine_says_what_it_lacks(myriad, tmp_path, monkeypatch):
    monkeypatch.setattr("myriad.analysis.bench.memory.available_bytes", lambda device: 1000)
    result = myriad("bench", *QUICK, "--out", tmp_path / "figures.json")
    assert result.code == 0
    assert "skipped: needs" in result.out
