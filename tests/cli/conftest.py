"""Fixtures of the command line's tests."""

import pytest

from calling import Caller


@pytest.fixture
def myriad(monkeypatch, capsys) -> Caller:
    """Calls the command line in this process."""
    return Caller(monkeypatch, capsys)
