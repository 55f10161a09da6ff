"""What the command line says of itself: help, version, presets, settings and their schema."""

import json
import subprocess
import sys
import time

import pytest
import yaml

import myriad as package
from calling import call_in_a_fresh_process
from myriad import ffn, presets
from myriad.config import validate
from myriad.train import RunConfig

VERBS = ("train", "eval", "generate", "demo", "presets", "data", "config", "bench", "inspect", "plan")


def test_help_answers_in_half_a_second():
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        result = call_in_a_fresh_process("--help")
        seconds.append(time.perf_counter() - started)
        assert result.code == 0
        assert all(verb in result.out for verb in VERBS)
        if seconds[-1] < 0.5:
            break
    assert min(seconds) < 0.5


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["eval", "--help"], ["--version"]])
def test_help_and_version_load_no_torch(words):
    program = f"import sys; sys.argv = ['myriad', *{words}]\nfrom myriad.cli import main\ntry:\n    main()\n"
    program += "finally:\n    heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    program += "    sys.stderr.write(repr(heavy))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stderr) == (0, "set()")


def test_version(myriad):
    assert myriad("--version").out == f"myriad {package.__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(myriad, verb):
    result = myriad(verb, "--help")
    assert result.code == 0
    assert "Usage: " in result.out


def test_no_words_show_the_help_and_an_unknown_verb_is_a_usage_error(myriad):
    assert "Usage: " in "".join(myriad()[1:])
    result = myriad("trian")
    assert result.code == 2
    assert "trian" in result.err
    assert "Traceback" not in result.err


def test_presets_lists_every_preset_with_its_cost(myriad, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = myriad("presets").out
    for name in presets.names():
        (line,) = (line for line in out.splitlines() if line.split()[1:2] == [name])
        assert presets.describe(name) in line
        assert f"{presets.get(name).model.cost().flops / 1e6:,.1f} M" in line


@pytest.mark.parametrize("preset", presets.names())
def test_what_config_show_prints_is_valid_input_again(myriad, preset, tmp_path):
    words = ["budget.tokens=2e6", "optim.lr=1e-4", "seed=7"]
    shown = myriad("config", "show", preset, *words)
    assert shown.code == 0
    path = tmp_path / "again.yaml"
    path.write_text(shown.out)
    run = validate(RunConfig, yaml.safe_load(shown.out))
    assert (run.budget.tokens, run.optim.lr, run.seed) == (2_000_000, 1e-4, 7)
    assert run.model == presets.get(preset).model
    assert myriad("config", "show", path).out == shown.out


def test_config_show_reads_a_run_folder(myriad, tmp_path):
    run = presets.get("demo-peer")
    (tmp_path / "run.json").write_text(json.dumps(run.model_dump(mode="json")))
    shown = validate(RunConfig, yaml.safe_load(myriad("config", "show", tmp_path).out))
    assert shown.out == str(tmp_path)
    assert shown.digest() == run.digest()


def references(node: object):
    """Every `$ref` in a schema."""
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    if isinstance(node, list):
        for value in node:
            yield from references(value)


def test_config_schema_is_whole_and_knows_every_kind(myriad):
    schema = json.loads(myriad("config", "schema").out)
    definitions = schema["$defs"]
    for reference in references(schema):
        assert reference.removeprefix("#/$defs/") in definitions
    root = definitions[schema["$ref"].removeprefix("#/$defs/")]
    assert root["properties"].keys() == RunConfig.model_fields.keys()
    assert root["additionalProperties"] is False
    kinds = [definitions[ref.removeprefix("#/$defs/")] for ref in references(definitions["FFNConfig"]["oneOf"])]
    assert {kind["properties"]["kind"]["const"] for kind in kinds} == set(ffn.kinds())


def test_config_schema_accepts_the_presets(myriad):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(myriad("config", "schema").out)
    validator = jsonschema.Draft202012Validator(schema)
    for name in presets.names():
        validator.validate(presets.get(name).model_dump(mode="json"))
    assert not validator.is_valid({**presets.get("demo-peer").model_dump(mode="json"), "sede": 1})


def test_the_installed_command_is_the_module():
    import importlib.metadata

    (script,) = importlib.metadata.entry_points(group="console_scripts", name="myriad")
    assert script.value == "myriad.cli:main"
