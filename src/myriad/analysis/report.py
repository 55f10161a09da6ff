"""One self-contained page on one or several trained runs: no script, nothing fetched, figures inside.

`render`, `picture`, `origins` and the forms of numbers serve other pages too (analysis/compare/page.py).
"""

import base64
import math
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from myriad.analysis.compare import Contender, Curve, summary
from myriad.analysis.plots import expert_usage, loss_curves
from myriad.analysis.routing import LayerUsage
from myriad.data.store import Store

MISSING = "–"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Sample(NamedTuple):
    """Text that a model wrote."""

    model: str
    prompt: str
    text: str
    """What follows the prompt."""
    settings: str
    """How it was drawn: temperature, seed and the like."""


class Picture(NamedTuple):
    """A figure in its four looks, as data URIs, with a text for those who do not see it."""

    wide: str
    wide_dark: str
    narrow: str
    narrow_dark: str
    alt: str


class Row(NamedTuple):
    """One of the things that are compared: a value for every contender."""

    label: str
    unit: str
    values: list[str]
    decisive: bool = False


class Group(NamedTuple):
    """Rows under a heading of their own."""

    heading: str
    rows: list[Row]


class Origins(NamedTuple):
    """On what the runs were made."""

    common: list[Row]
    """What is the same for all contenders."""
    own: list[Row]


def write_report(
    path: str | Path,
    *,
    title: str,
    contenders: Sequence[Contender],
    curves: Sequence[Curve],
    usages: Mapping[str, Sequence[LayerUsage]],
    samples: Sequence[Sample],
    corpus: Mapping[str, Any],
    commands: Sequence[str],
) -> None:
    """Write a report as one HTML file, whole or not at all.

    Args:
        path: the file.
        title: of the page.
        contenders: the runs; the sentence at the top compares the first with each of the others.
        curves: their losses.
        usages: name of a run -> its routed layers. Runs without routed layers are left out.
        samples: in the order in which they are shown.
        corpus: from `describe_corpus`.
        commands: which the reader types to make all of this again.
    """
    render(
        path,
        "report.html.jinja",
        title=title,
        verdicts=summary(contenders),
        names=[run.name for run in contenders],
        comparisons=_comparison(contenders),
        losses=draw_picture(loss_curves, curves, _describe_curves(curves)),
        usages=picture_usages(usages),
        samples=samples,
        corpus=corpus,
        commands=commands,
        origins=origins([[run] for run in contenders]),
        settings={run.name: run.run for run in contenders},
    )


def render(path: str | Path, template: str, **content: Any) -> None:
    """Write a page as one HTML file, whole or not at all.

    Args:
        path: the file.
        template: its name in this folder.
        content: what the template names.
    """
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    html = _templates().get_template(template).render(date=date, **content)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(html, encoding="utf-8", errors="replace")  # a model's text may hold half a surrogate pair
    os.replace(temporary, path)


def describe_corpus(store: Store) -> dict[str, Any]:
    """What a report says about its corpus: source, tokenizer, and each split's counts and hash."""
    index = store.index
    splits = {
        name: {field: getattr(split, field) for field in ("documents", "tokens", "words", "bytes", "sha256")}
        for name, split in index.splits.items()
    }
    return {
        "source": index.source,
        "source_sha256": index.source_sha256,
        "tokenizer_sha256": index.tokenizer_sha256,
        "vocab_size": index.vocab_size,
        "splits": splits,
    }


def _templates() -> jinja2.Environment:
    """Those of this folder, with the forms of numbers that pages have."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("myriad.analysis", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "brief": brief,
        "whole": whole,
        "percent": percent,
        "visible": visible,
    }
    return environment


def number(value: float | None) -> str:
    """Four significant digits; a dash for what is not there or not finite."""
    if value is None or not math.isfinite(value):
        return MISSING
    mantissa, exponent = f"{value:.3e}".split("e")
    power = int(exponent)
    if value and not -3 <= power < 6:
        return f"{mantissa} × 10{str(power).translate(SUPERSCRIPTS)}"
    return f"{value:,.{max(3 - power, 0)}f}" if value else "0"


def brief(value: float) -> str:
    """Two significant digits; more before the point if need be."""
    return f"{value:,.0f}" if value >= 10 else f"{value:#.2g}"


def whole(value: float | None) -> str:
    """A count with thousands separated."""
    return MISSING if value is None else f"{value:,.0f}"


def percent(share: float) -> str:
    """A share; one that is not quite all or nothing never reads as 100 % or 0 %."""
    text = f"{100 * share:.1f}"
    if text == "100.0" and share < 1:
        return "> 99.9 %"
    if text == "0.0" and share > 0:
        return "< 0.1 %"
    return f"{text} %"


def duration(seconds: float | None) -> str:
    """Hours, minutes and seconds, as far as they matter."""
    if seconds is None:
        return MISSING
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def visible(text: str) -> str:
    """Text whose control characters are shown as signs: a browser drops or changes them. Tabs and lines stay."""
    signs = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
    return text.translate(signs | {0x7F: 0x2421})


def _comparison(contenders: Sequence[Contender]) -> list[Group]:
    def row(label: str, unit: str, show: Callable[[Any], str], value: Callable[[Contender], Any], **options) -> Row:
        return Row(label, unit, [show(value(run)) for run in contenders], **options)

    cost = [
        row("Parameters", "total", whole, lambda run: run.cost.parameters),
        row("Active parameters", "per token", whole, lambda run: run.cost.active_parameters),
        row("FLOPs", "per token, forward", whole, lambda run: run.cost.flops),
    ]
    training = [
        row("Training tokens", "", whole, lambda run: run.training_tokens),
        row("Speed", "tokens/s, median of the steps", whole, lambda run: run.tokens_per_second),
        row("Training time", "without validation", duration, lambda run: run.seconds),
        row("Best validation loss", "nats per token", number, lambda run: run.best_validation_loss),
    ]
    held_out = [
        row("Bits per byte", "decides the verdict", number, lambda run: run.perplexity.bits_per_byte, decisive=True),
        row("Loss", "nats per token", number, lambda run: run.perplexity.loss),
        row("Token perplexity", "", number, lambda run: run.perplexity.token_perplexity),
        row("Word perplexity", "", number, lambda run: run.perplexity.word_perplexity),
        row("Evaluated on", "split", str, lambda run: run.split),
        row("Targets", "tokens, each counted once", whole, lambda run: run.perplexity.tokens),
        row("Context", "tokens of a window", whole, lambda run: run.perplexity.context),
        row("Stride", "tokens between windows", whole, lambda run: run.perplexity.stride),
    ]
    return [Group("Cost", cost), Group("Training", training), Group("Held-out text", held_out)]


def origins(groups: Sequence[Sequence[Contender]]) -> Origins:
    """On what the runs were made; where those of a contender or their sessions differ, all that they recorded.

    Args:
        groups: the runs of each contender.
    """

    def row(label: str, show: Callable[[dict[str, Any]], Any]) -> Row:
        return Row(label, "", [_distinct(show(session) for run in runs for session in run.sessions) for runs in groups])

    def versions(session: dict[str, Any]) -> str:
        return ", ".join(f"{name} {version}" for name, version in session.get("versions", {}).items())

    rows = [
        Row("Config", "digest", [_distinct(run.digest for run in runs) for runs in groups]),
        Row("Seed", "", [_distinct(str(run.run.seed) for run in runs) for runs in groups]),
        Row("Sessions", "", [str(sum(len(run.sessions) for run in runs)) for runs in groups]),
        row("Started", lambda session: session.get("time")),
        row("Hardware", lambda session: session.get("device")),
        row("Threads", lambda session: session.get("threads")),
        row("Precision", lambda session: session.get("precision")),
        row("Kernels", lambda session: _flat(session.get("kernels"))),
        row("Versions", versions),
    ]
    common = [row for row in rows if len(set(row.values)) == 1]
    return Origins(common, [row for row in rows if row not in common])


def _distinct(values: Any) -> str:
    return "; ".join(dict.fromkeys(str(value) for value in values if value)) or MISSING


def _flat(value: Any) -> Any:
    """A mapping as words; kernels may be one name or one for every op."""
    return ", ".join(f"{key}: {name}" for key, name in value.items()) if isinstance(value, Mapping) else value


def picture_usages(
    usages: Mapping[str, Sequence[LayerUsage]],
) -> list[tuple[str, Sequence[LayerUsage], Picture]]:
    """Name, layers and figure of each run that has routed layers."""
    return [
        (name, layers, draw_picture(expert_usage, layers, describe_usage(layers)))
        for name, layers in usages.items()
        if layers
    ]


def draw_picture(draw: Callable[..., bytes], content: Sequence[Any], alt: str) -> Picture:
    """A figure for a page, in its four looks.

    Args:
        draw: one of `plots`.
        content: what it draws.
        alt: the figure in words.
    """

    def look(stacked: bool, dark: bool) -> str:
        return f"data:image/png;base64,{base64.b64encode(draw(content, stacked=stacked, dark=dark)).decode()}"

    return Picture(look(False, False), look(False, True), look(True, False), look(True, True), alt)


def _describe_curves(curves: Sequence[Curve]) -> str:
    parts = ["Training loss and validation bits per byte against training tokens."]
    for curve in curves:
        bits = [value for value in curve.validation_bits if math.isfinite(value)]
        if bits:
            parts.append(f"{curve.name}: validation from {number(bits[0])} to {number(bits[-1])} bits per byte.")
    return " ".join(parts)


def describe_usage(layers: Sequence[LayerUsage]) -> str:
    """The figure of `expert_usage` in words."""
    parts = [f"{layer.name}: {percent(layer.share_used)} of {layer.experts:,} experts used" for layer in layers]
    return f"Sorted usage of the experts of each layer. {'; '.join(parts)}."
