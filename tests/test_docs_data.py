"""The blocks of docs/data.md are run as they stand, one after another."""

import re
import shlex
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text()


def blocks() -> list[tuple[str, str]]:
    """Language and text of every block that has a language."""
    return re.findall(r"^```(bash|python)\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


def test_every_block_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pyarrow", reason="the extra `data` is not installed")
    from myriad.cli import main

    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    ran = 0
    for language, text in blocks():
        if language == "python":
            exec(text, names)
            continue
        for command in text.splitlines():
            monkeypatch.setattr(sys, "argv", shlex.split(command))
            with pytest.raises(SystemExit) as ended:
                main()
            assert ended.value.code in (0, None), (command, capsys.readouterr().err)
            assert capsys.readouterr().out
            ran += 1
    assert ran >= 10
