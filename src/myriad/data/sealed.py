"""Index files that guard themselves: JSON with a hash of its own content."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from myriad.config import Config, ConfigError, validate
from myriad.data import DataError

SEAL = "sha256"
"""The key that holds a hash of all other keys."""

C = TypeVar("C", bound=Config)


def write_sealed(path: Path, index: Config) -> None:
    """Write an index, sealed."""
    content = index.model_dump(mode="json")
    text = json.dumps({**content, SEAL: _hash(content)}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def read_sealed(path: Path, kind: type[C], version: int, *, absent: str, again: str) -> C:
    """Read an index and check that it is what was written.

    Args:
        path: the file.
        kind: what it holds.
        version: of its key `format`.
        absent: what to say of a folder without it.
        again: how to make it anew.

    Raises:
        DataError: missing, of another version, or not what was written.
    """

    def damaged(why: str) -> DataError:
        return DataError(f"{path}: damaged ({why}); {again}")

    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path.parent}: {absent}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise damaged("not JSON") from None
    if not isinstance(raw, dict):
        raise damaged("not an object")
    if raw.get("format") != version:
        made = f"of format {json.dumps(raw.get('format'))[:40]}, not {version}"
        raise DataError(f"{path}: {made}: made by another version of Myriad, or damaged; {again}")
    if raw.pop(SEAL, None) != _hash(raw):
        raise damaged("it does not fit its own hash")
    try:
        return validate(kind, raw)
    except ConfigError as error:
        raise damaged(str(error).splitlines()[0]) from None


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
