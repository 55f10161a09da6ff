"""Fixtures that many tests share."""

import os

from myriad.cli import BEFORE_TORCH

os.environ.update(BEFORE_TORCH | os.environ)  # as the command line does, before torch is loaded

from collections.abc import Iterator

import pytest
import torch

from forking import Server
from myriad.data.prepare import Recipe, prepare
from myriad.data.store import Store

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def text() -> str:
    """Text with structure to learn: some sentences, in an order that never repeats."""
    subjects, verbs = ["the cat", "a dog", "my bird", "one fish"], ["sees", "likes", "hears", "finds"]
    lines = []
    for n in range(2000):
        lines.append(f"{n}: {subjects[n * 7 % 4]} {verbs[n * n % 4]} {subjects[n // 3 % 4]}.")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, text: str) -> Store:
    """A store of byte tokens with a train and a validation split."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(text)
    return prepare(Recipe(source=folder / "text.txt", tokenizer="bytes"), folder / "store")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Starts commands in processes of their own."""
    server = Server(tmp_path_factory.mktemp("said"))
    yield server
    server.close()
