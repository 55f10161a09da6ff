"""The command in many processes, quickly: forks of one process that has loaded all that the command needs.

A fork can have a limit on the size of files, or lack the rights by which root writes everywhere, and takes signals.
Several can be the ranks of one run.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from calling import Result

SERVER = """
import ctypes, json, os, resource, signal, sys, traceback

from myriad.cli import BEFORE_TORCH
os.environ.update(BEFORE_TORCH)
import torch
torch.set_num_threads(1)
import matplotlib.figure, matplotlib.backends.backend_agg, numba
import myriad.analysis.curve, myriad.analysis.measure, myriad.cli.app, myriad.hf.generation, myriad.presets
import myriad.train, myriad.train.trackers
from myriad.cli import main


def renounce_rights():
    '''Root's too; what the modes of files say holds then.'''
    if os.geteuid() == 0:
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        if ctypes.CDLL(None, use_errno=True).capset(header, none):
            raise OSError(ctypes.get_errno(), "capset")


def command(order):
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(os.path.join(order["folder"], name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.mkdir(os.path.join(order["folder"], "ready"))
    if order["largest"] is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["largest"], order["largest"]))
    if order["plain"]:
        renounce_rights()
    os.environ.update(order["environment"])
    sys.argv = ["myriad", *order["words"]]
    code = 0
    try:
        main()
    except SystemExit as exit:
        code = exit.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        answer = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
    else:
        answer = os.fork()
        if answer == 0:
            command(order)
    print(answer, flush=True)
"""


class Forked:
    """One command that runs, or has run."""

    def __init__(self, server: "Server", words: tuple[object, ...], folder: Path, **options: Any) -> None:
        self._server, self._folder = server, folder
        order = {"words": [str(word) for word in words], "folder": str(folder)}
        order |= {"environment": {}, "largest": None, "plain": False}
        self.pid = server.ask(order | options)
        self._result: Result | None = None
        until = time.monotonic() + 60
        while not (folder / "ready").exists():  # signals before that would not reach the command
            assert time.monotonic() < until
            time.sleep(0.001)

    def send(self, number: signal.Signals) -> None:
        if self._result is None:
            os.kill(self.pid, number)

    def wait(self) -> Result:
        if self._result is None:
            code = self._server.ask({"wait": self.pid})
            self._result = Result(code, *((self._folder / name).read_text() for name in ("out", "err")))
        return self._result


class Server:
    """Starts commands.

    Args:
        folder: for what they say.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-c", SERVER]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def ask(self, order: dict[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(self, *words: object, **options: Any) -> Forked:
        """Start a command; `environment`: what is added to it; `largest`: of bytes in a file; `plain`: without root's
        rights."""
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        return Forked(self, words, folder, **options)

    def run(self, *words: object, **options: Any) -> Result:
        return self.start(*words, **options).wait()

    def close(self) -> None:
        self._process.communicate()


class Ranks:
    """The processes of one run, as torchrun starts them, but that it ends none of them."""

    def __init__(self, server: Server, count: int, *words: object) -> None:
        self._store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        told = {"MASTER_ADDR": "localhost", "MASTER_PORT": self._store.port, "WORLD_SIZE": count}
        told |= {"LOCAL_WORLD_SIZE": count, "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
        self.processes = []
        for rank in range(count):
            environment = {name: str(value) for name, value in (told | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            self.processes.append(server.start(*words, environment=environment))

    def wait(self) -> list[Result]:
        return [process.wait() for process in self.processes]
