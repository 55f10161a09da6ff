"""`myriad bench`: how fast a PEER layer and whole models are here, beside PEER-pytorch and what the machine allows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from myriad.analysis.bench import BenchConfig, Measurement, ModelShape, Report, Spread
    from myriad.ffn import FFNConfig
    from myriad.models import ModelConfig, TransformerConfig

LARGEST_SIDE = 2**14
WIDTH = 140
"""Columns where the output is no terminal."""


def bench(
    quick: bool = typer.Option(False, "--quick", help="Small sizes and few runs: that it works, not how fast."),
    only: str = typer.Option(
        None, metavar="PART[,PART]", help="forward, step, decode (of the layer; all three: layer) or model."
    ),
    experts: str = typer.Option(
        None, metavar="SIDE[,SIDE]", help="Sizes of the layer by the sides of their squares: 256,512,1024,2048."
    ),
    repeats: int = typer.Option(None, help="Timed runs of each contender."),
    kernels: str = typer.Option("auto", help="auto, reference, ..."),
    out: Path = typer.Option(Path("bench.json"), help="Where to write all figures as JSON."),
) -> None:
    """Measure the layer and whole models, interleaved with PEER-pytorch (the extra `bench`) on the same weights."""
    from rich.console import Console

    from myriad.analysis.bench import run_bench

    settings = _settings(quick, only, experts, repeats, kernels)
    _refuse_unwritable(out)
    with _progress() as say:
        report = run_bench(settings, _models(settings, quick), say)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    for line in _machine(report):
        console.print(line, markup=False, soft_wrap=True)
    for what, found in groupby(sorted(report.measurements, key=_order), key=lambda one: one.what):
        _print_table(console, what, list(found))
    out.write_text(report.model_dump_json(indent=1) + "\n")
    console.print(f"{out}: written", markup=False, soft_wrap=True)


def _settings(quick: bool, only: str | None, experts: str | None, repeats: int | None, kernels: str) -> BenchConfig:
    """The settings that the options name.

    Raises:
        ConfigError: an option that cannot be.
    """
    from myriad.analysis.bench import BenchConfig
    from myriad.config import validate

    base = BenchConfig.quick() if quick else BenchConfig()
    changes: dict[str, object] = {"kernels": kernels}
    if only is not None:
        changes["parts"] = _parts(only)
    if experts is not None:
        changes["sides"] = _sides(experts)
    if repeats is not None:
        changes["repeats"] = repeats
    return validate(BenchConfig, base.model_dump() | changes)


def _parts(text: str) -> list[str]:
    from myriad.analysis.bench.settings import Part
    from myriad.config import ConfigError, nearest

    groups = {part: [part] for part in get_args(Part)} | {"layer": ["forward", "step", "decode"]}
    words = text.split(",")
    for word in words:
        if word not in groups:
            raise ConfigError(f"--only: unknown part '{word}'{nearest(word, groups)} (known: {', '.join(groups)})")
    return [part for word in words for part in groups[word]]


def _sides(text: str) -> list[int]:
    from myriad.config import ConfigError

    words = text.split(",")
    if not all(word.isdecimal() and 1 <= int(word) <= LARGEST_SIDE for word in words):
        raise ConfigError(f"--experts: expected sides from 1 to {LARGEST_SIDE} such as 256,512, found '{text}'")
    return [int(word) for word in words]


def _refuse_unwritable(out: Path) -> None:
    """Before minutes of measuring, not after."""
    from myriad.config import ConfigError

    out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        raise ConfigError(f"--out: {out} cannot be written")


def _models(settings: BenchConfig, quick: bool) -> list[ModelShape]:
    """Whole models with the layer's options: the preset peer-256x256, and the published code's model, with two PEER
    layers a block, which takes 1,022 tokens a step."""
    from myriad import presets
    from myriad.analysis.bench import ModelShape
    from myriad.ffn import StackConfig
    from myriad.models import TransformerConfig

    if quick:
        small = TransformerConfig(vocab_size=64, context=32, layers=2, d_model=settings.d_model, heads=2)
        small = _with_ffn(small, settings.layer(16))
        return [ModelShape(name="small", model=small, sequences=2, length=32, decode=True)]
    layer = settings.layer(256)
    one = _with_ffn(presets.get("peer-256x256").model, layer)
    two = _with_ffn(presets.get("peer-512x512").model, StackConfig(layers=[layer, layer]))
    return [
        ModelShape(name="peer-256x256", model=one, sequences=2, length=512, decode=True),
        ModelShape(name="2 x peer-256x256", model=two, sequences=2, length=511),
    ]


def _with_ffn(model: ModelConfig, ffn: FFNConfig) -> TransformerConfig:
    """A model with another layer in every block."""
    from myriad.models import TransformerConfig

    assert isinstance(model, TransformerConfig)
    return model.model_copy(update={"ffns": {"ffn": ffn}, "pattern": ["ffn"]})


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A function to tell what is being measured: a live line on a terminal, else a line each, on stderr."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda stage: console.print(stage, markup=False, soft_wrap=True)
        return
    with console.status("starting") as status:
        yield status.update


def _machine(report: Report) -> Iterator[str]:
    """What the figures were taken on."""
    yield f"{report.device}: {report.processor}, {report.threads} threads" if report.device == "cpu" else report.device
    yield ", ".join(f"{name} {version or 'not installed'}" for name, version in report.versions.items())
    yield "kernels: " + ", ".join(f"{op} {name}" for op, name in report.kernels.items())
    rates = report.rates
    yield (
        f"memory: copy {rates.copy_bytes / 1e9:.1f}, read {rates.read_bytes / 1e9:.1f}, "
        f"random rows {rates.gather_bytes / 1e9:.1f} GB/s; "
        f"products: float32 {rates.float32_flops / 1e9:,.0f}, bfloat16 {rates.bfloat16_flops / 1e9:,.0f} GFLOP/s"
    )


def _order(one: Measurement) -> int:
    from myriad.analysis.bench.report import What

    return get_args(What).index(one.what)


def _print_table(console: Console, what: str, found: Sequence[Measurement]) -> None:
    """The figures of one kind, and why there are none of some."""
    figures = [(one, one.value) for one in found if one.value is not None]
    console.print()
    console.print(f"{what}, {found[0].unit}" if figures else what, style="bold", markup=False)
    if figures:
        console.print(_table(figures))
    for one in found:
        if one.missing is not None:
            console.print(f"{one.shape}, {one.who}: {one.missing}", markup=False, soft_wrap=True)


def _table(figures: Sequence[tuple[Measurement, Spread]]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table("size", "whose", "precision", box=box.SIMPLE_HEAD)
    for column in ("median", "quartiles", "vs PEER-pytorch", "growth", "difference", "bound"):
        table.add_column(column, justify="right")
    for one, value in figures:
        table.add_row(
            one.shape,
            one.who if one.in_turns else f"{one.who}, alone",
            one.precision,
            _number(value.median),
            f"{_number(value.low)} to {_number(value.high)}",
            _ratio(one.ratio),
            "" if one.growth is None else f"{one.growth:.2f}",
            "" if one.difference is None else f"{one.difference.relative:.1e}",
            "" if one.bound is None else _number(one.bound),
        )
    return table


def _ratio(ratio: Spread | None) -> str:
    return "" if ratio is None else f"{ratio.median:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"


def _number(value: float) -> str:
    """Three digits at least, thousands separated."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
