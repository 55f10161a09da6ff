"""How the tests call the command line: in this process, for speed, or as a user would, in a fresh one."""

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

import pytest

from myriad.cli import main


class Result(NamedTuple):
    code: int
    out: str
    err: str


class Caller:
    """Calls `main()` in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *words: object) -> Result:
        self._monkeypatch.setattr(sys, "argv", ["myriad", *map(str, words)])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main()
        said = self._capsys.readouterr()
        code = exit.value.code
        return Result(code if isinstance(code, int) else int(code is not None), said.out, said.err)


def call_in_a_fresh_process(*words: object, cwd: object = None, options: Sequence[str] = ()) -> Result:
    command = [sys.executable, *options, "-m", "myriad", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False, timeout=300)
    return Result(done.returncode, done.stdout, done.stderr)
