"""The pages' commands and code are run as they stand: each page from top to bottom, in an empty folder.

- A line of a bash block that begins with `myriad` is called in this process, for speed; any other by a shell.
- Python blocks share their names.
- A block whose first line is a comment with the name of a file, such as `# small.yaml`, is written to that file.

Other blocks (`text`, `console`, `sh`) are not run.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import myriad
from myriad.cli import main
from myriad.data.sources import PythonSource
from myriad.ffn import FFNConfig

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "docs/tour.md", "docs/data.md", "docs/pyper.md"]
LAYERS = [f"docs/{name}.md" for name in ("dense", "expert_choice", "product_key_memory", "stack", "token_choice")]
"""Pages of one layer each: code alone."""


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and content of each block to run."""
    return re.findall(r"^```(bash|python|yaml)\n(.*?)^```$", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def call(monkeypatch, capsys):
    """Calls one line of a bash block."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(myriad.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }

    def call(line: str) -> None:
        words = shlex.split(line, comments=True)
        if words[0] != "myriad":
            subprocess.run(line, shell=True, check=True, env=environment, timeout=300)
            return
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert ended.value.code in (0, None), f"{line}\n{said.err}"
        assert said.out, line

    return call


@pytest.fixture
def little_text(monkeypatch):
    """An eighth of the standard library's files: the pages' commands read and evaluate all that there are."""
    names = PythonSource._names
    monkeypatch.setattr(PythonSource, "_names", lambda source: names(source)[::8])


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("little_text")
@pytest.mark.parametrize("page", PAGES + LAYERS)
def test_every_command_and_every_block_of_code(page, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FFNConfig, "kinds", dict(FFNConfig.kinds))  # a page may register a layer of its own
    names: dict[str, object] = {}
    found = blocks(page)
    assert {language for language, _ in found} >= ({"python"} if page in LAYERS else {"bash", "python"})
    for language, content in found:
        file = re.match(r"# (\S+\.\w+)\n", content)
        if file:
            Path(file[1]).write_text(content)
        elif language == "bash":
            for line in content.replace("\\\n", " ").splitlines():
                call(line)
        elif language == "python":
            exec(compile(content, page, "exec"), names)


@pytest.mark.parametrize("kind", FFNConfig.kinds)
def test_every_layer_has_a_page_with_all_that_one_must_know(kind):
    page = (ROOT / "docs" / f"{kind}.md").read_text()
    headings = re.findall(r"^## (.*)$", page, flags=re.MULTILINE)
    assert {"Equations", "Shapes", "Options", "Cost"} <= set(headings)
    assert f"src/myriad/ffn/{kind}.py" in page
    fields = FFNConfig.kinds[kind].model_fields.keys() - {"kind"}
    options = page.split("## Options")[1].split("\n## ")[0]
    assert not {name for name in fields if f"`{name}`" not in options}
    assert f"docs/{kind}.md" in (ROOT / "README.md").read_text()


def test_every_link_leads_somewhere():
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
