"""`myriad generate`."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from myriad import checkpoint
from myriad.checkpoint import CheckpointError
from myriad.cli.generate import generate
from myriad.config import ConfigError
from myriad.data.tokenizer import byte_tokenizer
from myriad.ffn import PEERConfig
from myriad.models import TransformerConfig

app = typer.Typer()
app.command()(generate)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    byte_tokenizer().save(folder)
    torch.manual_seed(0)
    peer = PEERConfig(experts=16, heads=2, experts_per_head=2, d_key=4)
    config = TransformerConfig(
        vocab_size=257, context=32, layers=1, d_model=16, heads=2, ffns={"peer": peer}, pattern=["peer"]
    )
    written = checkpoint.save_checkpoint(
        folder / "run",
        1,
        config.build(),
        run_config={},
        tokenizer=folder / "tokenizer.json",
        end_id=256,
        tensors={},
        state={},
    )
    checkpoint.publish(folder / "run", written, None)
    return folder / "run"


def call(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def expected(run: Path, prompt: str, **options) -> str:
    from myriad.hf import generate_text

    return f"{prompt}{generate_text(run, prompt, **options)[0].text}\n"


def test_the_text_and_nothing_else_goes_to_stdout(run):
    result = call(run, "--prompt", "dé", "--seed", 3, "--max-tokens", 10, "--top-k", 50, "--top-p", 0.9)
    assert result.exit_code == 0
    assert result.stdout_bytes.decode() == expected(run, "dé", seed=3, max_tokens=10, top_k=50, top_p=0.9)
    assert result.stderr == ""


def test_streaming_prints_the_same(run):
    words = (run, "--prompt", "a b", "--seed", 3, "--max-tokens", 20)
    assert call(*words, "--stream").stdout_bytes == call(*words).stdout_bytes


def test_temperature_zero_needs_no_seed(run):
    words = (run, "--temperature", 0, "--max-tokens", 10)
    assert call(*words).stdout_bytes == call(*words).stdout_bytes


def test_a_stop_at_the_context_is_noted_on_stderr(run):
    result = call(run, "--prompt", "x" * 20, "--temperature", 0)
    assert result.stderr == "myriad: stopped at the model's context of 32 tokens\n"


def test_errors_leave_stdout_empty(run, tmp_path):
    for words, error in (
        ((tmp_path / "nothing",), CheckpointError),
        ((run, "--prompt", "x" * 40, "--stream"), ValueError),
        ((run, "--top-p", 0), ConfigError),
    ):
        result = call(*words)
        assert isinstance(result.exception, error)
        assert result.stdout_bytes == b""


def test_the_real_command_is_silent_on_stderr_and_writes_utf8_whatever_the_locale(run):
    words = [sys.executable, "-m", "myriad", "generate", str(run), "--prompt", "dé", "--seed", "1", "--max-tokens", "9"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONIOENCODING": "ascii", "HOME": str(run)}
    result = subprocess.run(words, capture_output=True, env=environment, check=False, timeout=300)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.decode() == expected(run, "dé", seed=1, max_tokens=9)
