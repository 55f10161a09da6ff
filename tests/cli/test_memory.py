"""How the command line has the C library keep memory."""

import os
import sys
from types import SimpleNamespace

import pytest

from myriad import cli


@pytest.fixture
def asked(monkeypatch) -> list[tuple[int, int]]:
    """What the C library is asked for, where it is glibc."""
    calls: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda *setting: calls.append(setting))
    monkeypatch.setattr(cli.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(sys, "platform", "linux")
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    return calls


def test_no_tensor_is_mapped_by_itself(asked):
    cli._keep_freed_memory()
    assert (cli.M_MMAP_MAX, 0) in asked


def test_settings_in_the_environment_stand(asked, monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    cli._keep_freed_memory()
    assert not asked


def test_a_library_without_settings_is_left_alone(asked, monkeypatch):
    monkeypatch.setattr(cli.ctypes, "CDLL", lambda name: SimpleNamespace())
    cli._keep_freed_memory()
    assert not asked
