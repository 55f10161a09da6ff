"""The demo on a small text: the same path as `make demo`, in seconds."""

import json


def test_the_demo_leaves_two_runs_a_report_and_a_plot(myriad, tmp_path, text):
    (tmp_path / "text").mkdir()
    for split, part in (("train", text), ("validation", text[:5000]), ("test", text[:9000])):
        (tmp_path / "text" / f"{split}.txt").write_text(part)
    data = [f"data.source={tmp_path / 'text'}", "data.tokenizer=bpe:300"]
    small = [*data, "model.layers=1", "budget.steps=4", "evaluation.every=2"]
    out = tmp_path / "demo"
    told = myriad("demo", "--out", out, *small)
    assert told.code == 0
    assert "bits per byte" in told.out
    assert "one seed each" in told.out
    report = (out / "report.html").read_text()
    for name in ("demo-peer", "demo-dense"):
        session = json.loads((out / name / "sessions.jsonl").read_text())
        assert session["config"] in report
        assert session["data"]["source_sha256"] in report
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    # Called again, it trains nothing anew.
    assert myriad("demo", "--out", out, *small).code == 0
    steps = [json.loads(line)["step"] for line in (out / "demo-peer" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 2, 3, 4, 4]
