"""The README's commands and code are run as they stand."""

import re
import shlex
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.timeout(900)
def test_every_command_and_every_block_of_code(tmp_path, monkeypatch, capsys):
    from myriad.cli import main

    monkeypatch.chdir(tmp_path)
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(commands) >= 8
    for command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code in (0, None), command
        assert capsys.readouterr().out
    names: dict[str, object] = {}
    for code in blocks("python"):
        exec(code, names)
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_every_link_leads_somewhere():
    root = Path(__file__).parents[1]
    for page in [root / "README.md", *root.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
