"""Tables of rows that are looked up: a layer's own, and those that several layers share.

A shared table belongs to the model, as a module of its own; a layer's config names it. The layer holds that module
without registering it, so that a table is one parameter, one key of the state dict and one state of the optimizer.
It holds the module rather than the parameter, which loading may replace.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from myriad.config import Config, ConfigError, Count, nearest
from myriad.kernels.pages import in_large_pages

TableDtype = Literal["bfloat16"]


class TableConfig(Config):
    """Tables that layers share: those that name it in `table`."""

    rows: Count = Field(ge=1)
    """Rows, as many as the layers' experts or memories."""
    width: int | None = Field(default=None, ge=1)
    """Width of a row; None: d_model."""
    parts: list[str] = Field(default=["values"], min_length=1)
    """The tables of this size that belong together: [values] of memories, [down, up] or [down, up, gate] of PEER."""
    dtype: TableDtype | None = None
    """Of the rows, as in a layer's `table_dtype`; None: the model's own."""

    def parameters(self, d_model: int) -> int:
        """Numbers in all parts."""
        return len(self.parts) * self.rows * (self.width or d_model)

    def sizes(self, d_model: int) -> dict[str, Any]:
        """What two tables must agree in to be the same."""
        return {**self.model_dump(), "width": self.width or d_model}


class TableUse(NamedTuple):
    """That a layer uses a shared table."""

    field: str
    """Where in the layer's config the table is named."""
    name: str
    needs: TableConfig
    """What the table must be."""


def refuse_misfits(tables: Mapping[str, TableConfig], uses: Mapping[str, TableUse], d_model: int) -> None:
    """Check a model's tables against their uses, which are told apart by their places in the model's config.

    Raises:
        ValueError: names the first place that does not fit.
    """
    for place, use in uses.items():
        if use.name not in tables:
            known = ", ".join(tables) or "none"
            raise ValueError(
                f"{place} names '{use.name}', not one of tables{nearest(use.name, tables)} (known: {known})"
            )
        found, needed = (table.sizes(d_model) for table in (tables[use.name], use.needs))
        for size, value in needed.items():
            if found[size] != value:
                values = f"{json.dumps(found[size])}, but {place} needs {json.dumps(value)}"
                raise ValueError(f"tables.{use.name}.{size} = {values}")
    for name in tables:
        if re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII) is None or hasattr(nn.Module(), name):
            can = "letters, digits and _ can, but no attribute of modules"
            raise ValueError(f"tables: '{name}' cannot name a table: {can}")
        if name not in {use.name for use in uses.values()}:
            raise ValueError(f"tables.{name} is used by no layer: one names it in its field `table`")


class SharedTable(nn.Module):
    """A model's table: a parameter for each part."""

    def __init__(self, config: TableConfig, d_model: int) -> None:
        super().__init__()
        for part in config.parts:
            self.register_parameter(part, new_table(config.rows, config.width or d_model, config.dtype))


class Borrowed(NamedTuple):
    """A shared table in the hands of a layer: inside a tuple, PyTorch does not take it for a part of the layer."""

    table: SharedTable

    def part(self, name: str) -> Tensor:
        return getattr(self.table, name)


Tables = Mapping[str, SharedTable]
NO_TABLES: Tables = {}


def borrow(tables: Tables, name: str | None) -> Borrowed | None:
    """The shared table that a layer's config names in its field `table`, if it names one.

    Raises:
        ConfigError: it is not there.
    """
    if name is None:
        return None
    if name not in tables:
        raise ConfigError(f"table: '{name}' is not there to be shared; a layer that is built alone has its own (null)")
    return Borrowed(tables[name])


def new_table(rows: int, width: int, dtype: TableDtype | None) -> nn.Parameter:
    """Rows with a standard deviation of width**-0.5: their products with normalised vectors are of order one."""
    table = nn.Parameter(in_large_pages(torch.empty(rows, width, dtype=torch.bfloat16 if dtype else None)))
    return nn.init.normal_(table, std=width**-0.5)  # pyright: ignore[reportReturnType]


def bytes_of(dtype: TableDtype | None) -> int:
    """Of one number of a table, where the model's own are float32."""
    return 2 if dtype == "bfloat16" else 4
