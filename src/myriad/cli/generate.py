"""`myriad generate`: text from a run."""

from __future__ import annotations

from pathlib import Path

import typer


def generate(
    run: Path = typer.Argument(metavar="RUN", help="A run folder or a checkpoint."),
    prompt: str = typer.Option("", help="The text to continue; none: a new document."),
    max_tokens: int = typer.Option(100, help="The most new tokens."),
    temperature: float = typer.Option(1.0, help="Of the sampled distribution; 0: always the most likely token."),
    top_k: int = typer.Option(0, help="Sample from so many of the most likely tokens; 0: from all."),
    top_p: float = typer.Option(1.0, help="Sample from the fewest tokens that have this probability together."),
    seed: int = typer.Option(None, help="The same seed gives the same text."),
    stream: bool = typer.Option(False, "--stream", help="Print the text as it comes."),
) -> None:
    """Continue a text with a trained model."""
    from myriad.hf.generation import generate_text, open_model

    unwritten = [prompt]

    def write(piece: str) -> None:
        """Bytes, so that a terminal's or pipe's own encoding cannot fail; the prompt goes before the first piece."""
        typer.echo("".join((*unwritten, piece)).encode(), nl=False)
        unwritten.clear()

    opened = open_model(run)
    (made,) = generate_text(
        opened,
        prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stream=write if stream else None,
    )
    write("\n" if stream else f"{made.text}\n")
    if made.stopped == "context":
        context = opened.model.config.max_position_embeddings
        typer.echo(f"myriad: stopped at the model's context of {context} tokens", err=True)
