"""What may import what (docs/architecture.md), read from the syntax trees."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import myriad

SOURCE = Path(myriad.__file__).parent

ORDER = [
    "config",
    "distributed",
    "kernels",
    "ffn",
    "models",
    "checkpoint",
    "evaluate",
    "train",
    "analysis",
    "presets",
    "hf",
    "cli",
]
ALLOWED: dict[str, set[str]] = {room: set(ORDER[: place + 1]) for place, room in enumerate(ORDER)}
ALLOWED["data"] = {"config", "distributed", "data"}
for room in ORDER[ORDER.index("evaluate") :]:
    ALLOWED[room].add("data")

OWNERS = {  # package -> where alone it may be imported
    "matplotlib": "analysis/plots/",
    "transformers": "hf/",
    "numba": "kernels/cpu/",
    "triton": "kernels/triton/",
    "PEER_pytorch": "analysis/bench/",
    "tensorboard": "train/trackers.py",
    "wandb": "train/trackers.py",
    "pickle": "nowhere",
    "cloudpickle": "nowhere",
    "dill": "nowhere",
    "joblib": "nowhere",
    "shelve": "nowhere",
}


def violations(path: str, source: str) -> list[str]:
    """What a file, named by its path inside the package, does against the rules."""
    tree = ast.parse(source)
    found = [*_unpicklings(tree), *_prints(path, tree)]
    for line, module in _imports(path, tree):
        top, _, rest = module.partition(".")
        owner = OWNERS.get(top)
        if owner and not path.startswith(owner):
            found.append((line, f"{top} may be imported in {owner} only"))
        if top == "myriad":
            found += [(line, fault) for fault in _misplaced(path, rest.partition(".")[0])]
    return [f"{path}:{line}: {fault}" for line, fault in sorted(found)]


def _misplaced(path: str, target: str) -> Iterator[str]:
    room = _room(path)
    if room not in ALLOWED:
        yield f"unknown room {room}"
    elif target in ("", "__main__"):  # the package's own names can be anything's
        if room != "cli":
            yield "myriad itself may be imported by cli only"
    elif target not in ALLOWED[room]:
        yield f"{room} may not import {target}"


def _room(path: str) -> str:
    room = path.split("/")[0].removesuffix(".py")
    return "cli" if room == "__main__" else room


def _imports(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full module name of every import, wherever it stands, those by `import_module` too."""
    package = ["myriad", *path.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                if base == "myriad" and alias.name == "__version__":
                    continue
                is_room = base == "myriad" and alias.name in ALLOWED
                yield node.lineno, f"{base}.{alias.name}" if is_room else base
        elif isinstance(node, ast.Call) and _name(node.func) in ("import_module", "__import__"):
            name = node.args[0] if node.args else None
            if isinstance(name, ast.Constant):
                yield node.lineno, str(node.args[0].value)


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _unpicklings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
            yield node.lineno, "torch.load unpickles"
        if isinstance(node, ast.ImportFrom) and node.module in ("torch", "torch.serialization"):
            yield from ((node.lineno, "torch.load unpickles") for alias in node.names if alias.name == "load")
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            yield node.value.lineno, "allow_pickle unpickles"


def _prints(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    if _room(path) == "cli" or path.split("/")[-1].startswith("demo"):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield node.lineno, "print belongs to cli"


def test_the_package_follows_the_rules():
    files = [path for path in sorted(SOURCE.rglob("*.py")) if path != SOURCE / "__init__.py"]
    assert len(files) > 15
    found = [fault for path in files for fault in violations(path.relative_to(SOURCE).as_posix(), path.read_text())]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "fault"),
    [
        ("ffn/peer.py", "from myriad.models import Transformer", "ffn may not import models"),
        ("ffn/peer.py", "import myriad.models.base as base", "ffn may not import models"),
        ("ffn/peer.py", "from myriad import models", "ffn may not import models"),
        ("ffn/peer.py", "from ..models.base import LanguageModel", "ffn may not import models"),
        ("ffn/peer.py", "from .. import train", "ffn may not import train"),
        ("ffn/peer.py", "def lazily():\n    import myriad.train.loop", "ffn may not import train"),
        ("ffn/peer.py", "import_module('myriad.hf')", "ffn may not import hf"),
        ("ffn/peer.py", "importlib.import_module('myriad.hf')", "ffn may not import hf"),
        ("ffn/peer.py", "import torch, myriad", "myriad itself may be imported by cli only"),
        ("ffn/peer.py", "from myriad import load", "myriad itself may be imported by cli only"),
        ("kernels/cpu/adam.py", "from myriad.data import store", "kernels may not import data"),
        ("config.py", "from myriad.distributed import rank", "config may not import distributed"),
        ("checkpoint.py", "from myriad.data.store import Store", "checkpoint may not import data"),
        ("data/store.py", "from myriad.kernels import use", "data may not import kernels"),
        ("presets/small.py", "from myriad.cli import main", "presets may not import cli"),
        ("helpers.py", "import myriad.config", "unknown room helpers"),
        ("analysis/report.py", "import matplotlib.pyplot", "matplotlib may be imported in analysis/plots/ only"),
        ("models/base.py", "from transformers import AutoConfig", "transformers may be imported in hf/ only"),
        ("hf_like.py", "def f():\n    import transformers", "transformers may be imported in hf/ only"),
        ("kernels/bags.py", "import numba", "numba may be imported in kernels/cpu/ only"),
        ("kernels/cpu/bags.py", "import triton.language", "triton may be imported in kernels/triton/ only"),
        ("checkpoint.py", "import pickle", "pickle may be imported in nowhere only"),
        ("hf/config.py", "state = torch.load(path, weights_only=True)", "torch.load unpickles"),
        ("hf/config.py", "from torch import load", "torch.load unpickles"),
        ("data/store.py", "np.load(path, allow_pickle=True)", "allow_pickle unpickles"),
        ("train/loop.py", "def step():\n    print(1)", "print belongs to cli"),
    ],
)
def test_a_planted_violation_is_caught(path, source, fault):
    (found,) = violations(path, source)
    assert found.startswith(f"{path}:{source.count(chr(10)) + 1}: {fault}")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ffn/peer.py", "from myriad.kernels import use\nfrom . import base\nfrom ..config import Config"),
        ("evaluate/perplexity.py", "from myriad.data import Store\nfrom myriad import __version__, models"),
        ("data/store.py", "from myriad.data.tokenizer import load\nfrom myriad import config, distributed"),
        ("cli/train.py", "import myriad\nfrom myriad import load\nprint(importlib.import_module(name))"),
        ("analysis/plots/losses.py", "import matplotlib"),
        ("analysis/demo.py", "print(1)"),
        ("hf/serving.py", "from transformers import AutoConfig"),
        ("kernels/cpu/bags.py", "import numba"),
        ("data/store.py", "np.load(path, allow_pickle=False); json.load(file); console.print(1)"),
    ],
)
def test_what_is_allowed_passes(path, source):
    assert violations(path, source) == []


def test_importing_the_package_loads_no_torch():
    check = "import myriad, sys; assert 'torch' not in sys.modules; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)
