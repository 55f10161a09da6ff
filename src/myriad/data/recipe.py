"""Recipes: all that decides what a prepared store holds."""

import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from myriad.config import Config, Count


def _as_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, Path) else value


def _as_share(value: Any) -> Any:
    """A number stays or becomes a float, also one that is written as a word; anything else is a source."""
    if not isinstance(value, str | int | float):
        return _as_text(value)
    try:
        share = float(value)
    except ValueError:
        return value
    except OverflowError:  # an integer beyond the largest float
        share = math.inf
    if isinstance(value, bool) or not 0 < share < 1:
        raise ValueError(f"expected a share between 0 and 1, or a source, found {value}")
    return share


def _is_expression(value: str) -> str:
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{value!r} is no regular expression ({error})") from None
    return value


def _two_or_three(lengths: tuple[int, ...]) -> tuple[int, ...]:
    if len(lengths) not in (2, 3):
        raise ValueError(f"expected the bytes of train, validation and perhaps test, found {len(lengths)} numbers")
    return lengths


Spec = Annotated[str, BeforeValidator(_as_text)]
HeldOut = Annotated[str | float | None, BeforeValidator(_as_share)]


class Preparation(Config):
    """How a source becomes the splits of a store."""

    tokenizer: Spec = "bytes"
    """`bytes`, `bpe:8192` (trained on the text), `gpt2`, or a tokenizer.json, a store, a run, or a folder with
    GPT-2's `encoder.json` and `vocab.bpe`."""
    validation: HeldOut = None
    """Another source, or a share of the training documents, the last ones (of the bytes, where there is one
    document). None: the source's own validation split, else the last 5 %."""
    test: HeldOut = None
    """Another source, or a share, which comes after that for validation. None: the source's own test split."""
    split_bytes: Annotated[tuple[Annotated[Count, Field(ge=1)], ...], AfterValidator(_two_or_three)] | None = None
    """Bytes of train, validation and, if there is a third number, test: the text is cut at exactly these places."""
    field: str = "text"
    """Which field of a row holds the text."""
    document_start: Annotated[str, AfterValidator(_is_expression)] | None = None
    """A regular expression: a line of a text file, or a row, in which it is found begins a document, and what
    follows belongs to that document. None: every file, or every row, is a document."""

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        shares = [share for share in (self.validation, self.test) if isinstance(share, float)]
        if sum(shares) >= 1:
            raise ValueError(f"shares of {' and '.join(map(str, shares))} leave nothing to train on")
        return self

    @model_validator(mode="after")
    def _one_way_to_split(self) -> Self:
        if self.split_bytes is not None and (self.validation is not None or self.test is not None):
            raise ValueError("split_bytes says where all splits are; validation and test cannot be set beside it")
        return self


class Recipe(Preparation):
    """A source and how it becomes a store. The same recipe and the same text give the same store."""

    source: Spec
    """`python` (the standard library's own sources), a text file, a JSONL or parquet file (compressed JSONL too),
    a folder of such files, or a Hugging Face dataset, `owner/name` or `owner/name:config`, `@revision` after it."""

    def located(self) -> "Recipe":
        """The recipe with the paths in it made absolute, so that it means the same from any folder."""
        places = {name: getattr(self, name) for name in ("source", "validation", "test", "tokenizer")}
        found = {name: str(Path(place).resolve()) for name, place in places.items() if _is_path(place)}
        return self.model_copy(update=found)


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and value != "python" and os.path.exists(value)
