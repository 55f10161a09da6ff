"""Text from a run: one plain function, over transformers' generation."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers.generation.streamers import TextStreamer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast
from transformers.utils import logging

from myriad.checkpoint import CheckpointError, refuse_broken_weights
from myriad.config import ConfigError
from myriad.hf.model import MyriadForCausalLM

GREEDY_BELOW = 1e-5
"""A temperature under this one is zero: logits divided by it would leave float32."""


class OpenModel(NamedTuple):
    """A model in eval mode and its tokenizer."""

    model: MyriadForCausalLM
    tokenizer: PreTrainedTokenizerBase


class Generation(NamedTuple):
    """One continuation of a prompt."""

    text: str
    """Without the prompt."""
    tokens: list[int]
    """The ids of the text, without an end token."""
    stopped: Literal["end", "length", "context"]
    """What ended it: the end token, the number of tokens asked for, or the model's context."""


def open_model(run: str | Path, device: str | torch.device | None = None) -> OpenModel:
    """Open a run folder or a checkpoint, for several prompts.

    Args:
        run: the folder.
        device: where to put the model; None: the accelerator, where there is one.

    Raises:
        CheckpointError: not there, damaged, with weights that are not finite, or without a tokenizer.
    """
    if not Path(run).is_dir():  # transformers would look for a model of that name on the Hub
        raise CheckpointError(f"{run}: no such run folder")
    with _without_progress_bar():
        model = MyriadForCausalLM.from_pretrained(run)
    folder = Path(model.name_or_path)
    refuse_broken_weights(model, folder)
    if not (folder / "tokenizer.json").exists():
        raise CheckpointError(f"{folder}: holds no tokenizer.json; text cannot be generated without one")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return OpenModel(model.to(device), tokenizer)


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def generate_text(
    run: str | Path | OpenModel,
    prompt: str,
    *,
    max_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    stream: Callable[[str], object] | None = None,
    samples: int = 1,
) -> list[Generation]:
    """Continue a text.

    The end token stands before the prompt, as it stood before every document in training; an empty prompt
    therefore begins a document. The characters `<|endoftext|>` in a prompt are text.

    Args:
        run: a run folder, a checkpoint, or what `open_model` returned.
        prompt: text.
        max_tokens: the most new tokens; the model's context may allow fewer.
        temperature: of the sampled distribution; 0: always the most likely token.
        top_k: sample from so many of the most likely tokens; 0: from all.
        top_p: sample from the fewest most likely tokens with at least this probability together.
        seed: of the sampling; the state of PyTorch's generator is left as it was. None: go on from that state.
        stream: called with each new piece of text, whole characters only; together they are the text.
        samples: how many continuations.

    Raises:
        ConfigError: an option that cannot be; the text names it.
        CheckpointError: the run cannot be opened.
        ContextError: the prompt fills the model's context.
    """
    _check_options(prompt, max_tokens, temperature, top_k, top_p, seed, stream, samples)
    model, tokenizer = run if isinstance(run, OpenModel) else open_model(run)
    prompt_BS = _prompt_ids(tokenizer, prompt).to(model.device)
    room = model.room_after(prompt_BS.shape[1])
    options = _sampling(temperature, top_k, top_p, samples)
    with _seeded(seed, model.device):
        ids_BS = model.generate(
            prompt_BS,
            attention_mask=torch.ones_like(prompt_BS),
            max_new_tokens=min(max_tokens, room),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            streamer=None if stream is None else _PieceStreamer(tokenizer, stream),
            **options,
        )
    limit = "length" if max_tokens <= room else "context"
    made = [_generation(tokenizer, row, limit) for row in ids_BS[:, prompt_BS.shape[1] :].tolist()]
    return made * (samples // len(made))  # greedy ones are all the same


def _check_options(
    prompt: str,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int | None,
    stream: Callable[[str], object] | None,
    samples: int,
) -> None:
    one_stream = "1 with a stream" if stream is not None else "at least 1"
    for name, value, expected, holds in (
        ("max_tokens", max_tokens, "at least 1", max_tokens >= 1),
        ("temperature", temperature, "a finite number of at least 0", 0 <= temperature < math.inf),
        ("top_k", top_k, "at least 0", top_k >= 0),
        ("top_p", top_p, "more than 0 and at most 1", 0 < top_p <= 1),
        ("seed", seed, "from 0 to 2**64 - 1", seed is None or 0 <= seed < 2**64),
        ("samples", samples, one_stream, samples == 1 or (samples > 1 and stream is None)),
    ):
        if not holds:
            raise ConfigError(f"{name}: expected {expected}, found {value}")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ConfigError("prompt: expected text, found bytes that are not UTF-8") from None


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
    """The end token and the prompt's tokens, int64 of shape (1, S)."""
    ids = tokenizer.encode(prompt, add_special_tokens=False, split_special_tokens=True, verbose=False)
    return torch.tensor([[tokenizer.eos_token_id, *ids]])


def _sampling(temperature: float, top_k: int, top_p: float, samples: int) -> dict[str, Any]:
    """Arguments of `generate`."""
    if temperature < GREEDY_BELOW:
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "num_return_sequences": samples,
    }


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed the one generator that sampling on this device draws from, and put its state back."""
    if seed is None:
        yield
        return
    generator = torch.default_generator
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index or 0]
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


class _PieceStreamer(TextStreamer):
    """Hands on text as soon as later tokens cannot change it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stream: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._stream = stream

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._stream(text)


def _generation(tokenizer: PreTrainedTokenizerBase, ids: list[int], limit: Literal["length", "context"]) -> Generation:
    """New tokens up to the first end token; in a batch, padding follows it."""
    end = tokenizer.eos_token_id
    tokens = ids[: ids.index(end)] if end in ids else ids
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert isinstance(text, str)
    return Generation(text, tokens, limit if len(tokens) == len(ids) else "end")
