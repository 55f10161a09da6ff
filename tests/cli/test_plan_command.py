"""`myriad plan`: the table, the file, and what it refuses."""

import json

import pytest
import yaml

from myriad.ffn import DenseConfig
from tiny import tiny_model, tiny_run


@pytest.fixture
def config(store, tmp_path):
    model = tiny_model(vocab_size=257, layers=1, ffns={"d": DenseConfig()}, pattern=["d"])
    path = tmp_path / "config.yaml"
    raw = tiny_run(store, model=model).model_dump(mode="json")
    raw["train"]["precision"] = "auto"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_a_line_for_each_layout_and_a_file(myriad, config, tmp_path):
    out = tmp_path / "new" / "plan.json"
    words = ["--devices", 2, "--memory", "1MB", "--flops", "2TFLOPS", "--tokens", "1e6", "--json", out]
    found = myriad("plan", config, *words)
    assert found.code == 0, found.err
    plan = json.loads(out.read_text())
    assert plan["tokens"] == 1_000_000
    assert plan["machine"] == {"memory": 1e6, "flops": 2e12, "bandwidth": None, "utilisation": 0.4}
    assert len(plan["lines"]) == 6
    assert f"config: {plan['parameters']:,} parameters" in found.out
    assert "times at 40% of 2 TFLOPS, which is assumed, not measured" in found.out
    assert "each of 2 devices, data parallel" in found.out
    assert found.out.count("bfloat16 weights") == 2
    assert found.out.count("too large") == sum(line["missing"] > 0 for line in plan["lines"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--memory", "80"], "--memory: expected a number with its unit, such as 80GB, found '80'"),
        (["--memory", "0GB"], "--memory: expected a number with its unit, such as 80GB, found '0GB'"),
        (["--flops", "990"], "--flops: expected a number with its unit, such as 990TFLOPS, found '990'"),
        (["--bandwidth", "4.8TB"], "--bandwidth: expected a number with its unit, such as 4.8TB/s, found '4.8TB'"),
        (["--tokens", "many"], "--tokens: expected a number of tokens, such as 200e9, found 'many'"),
        (["--utilisation", "1.5"], "utilisation: expected"),
        (
            ["--devices", "3"],
            "--devices: 8 sequences computed at once (256 tokens at a context of 32) cannot",
        ),
        (["model.vocab_size=null"], "model.vocab_size: not set"),
    ],
)
def test_bad_input_is_one_line(myriad, config, words, said):
    found = myriad("plan", config, *words)
    assert (found.code, found.out) == (2, "")
    assert said in found.err
    assert found.err.count("\n") == 1


def test_an_unknown_preset_is_one_line(myriad):
    found = myriad("plan", "demo-pear")
    assert found.code == 2
    assert "'demo-pear': neither a preset, a file nor a run folder; did you mean 'demo-peer'?" in found.err
