"""A language model of Myriad behind the interface of transformers: `from_pretrained`, `generate`, labels, caches."""

import copy
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.generic import can_return_tuple

from myriad.checkpoint import CheckpointError, intact_folder, read_json
from myriad.config import MyriadError
from myriad.hf.config import MyriadConfig
from myriad.models import LanguageModel, LayerCache


class ContextError(MyriadError, ValueError):
    """A prompt that leaves no room for a single token."""


@dataclass
class MyriadOutput(CausalLMOutputWithPast):
    """Transformers' output, and what our layers return beside it."""

    aux_loss: Tensor | None = None
    """The sum of the layers' auxiliary losses, with labels; in training it is part of the loss."""
    loads: tuple[dict[str, Tensor], ...] | None = None
    """In training: each layer's additive statistics, for `model.model.after_step` once an optimizer step."""


class MyriadForCausalLM(PreTrainedModel, GenerationMixin):
    """A `LanguageModel` as transformers' tools expect one.

    Training through transformers changes weights only. The layers' running statistics (query batch normalization,
    say) change where the loop hands `MyriadOutput.loads` to `model.model.after_step`, as `myriad.train` does.
    """

    config_class = MyriadConfig
    config: MyriadConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _input_embed_layer: ClassVar[str] = "embedding"

    def __init__(self, config: MyriadConfig) -> None:
        super().__init__(config)
        self.model: LanguageModel = config.language_model.build()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: our modules initialise themselves, and `from_pretrained` refuses a file that lacks a key."""

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride] (it returns a pair on request)
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Open a run folder, a checkpoint or another Hugging Face folder, in eval mode.

        Arguments are those of `PreTrainedModel.from_pretrained`. Only safetensors are read.

        Raises:
            CheckpointError: the folder holds no model of ours, is damaged, or its weights do not fit its config.
        """
        source, with_info = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        if source is not None and os.path.isdir(source):
            source = _intact(Path(source, kwargs.pop("subfolder", "")))
        options: dict[str, Any] = kwargs | {
            "use_safetensors": True,
            "ignore_mismatched_sizes": True,  # to be told of them: `_refuse_misfit` names what does not fit
            "output_loading_info": True,
        }
        try:
            model, info = super().from_pretrained(source, *args, **options)  # pyright: ignore[reportGeneralTypeIssues]
        except SafetensorError as error:
            raise CheckpointError(f"{source}: damaged ({error})") from None
        _refuse_misfit(source, info)
        return (model, info) if with_info else model

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the backward pass computes blocks again; `gradient_checkpointing_enable` sets it."""
        return getattr(self.model, "activation_checkpointing", False)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        self.model.activation_checkpointing = enabled  # pyright: ignore[reportArgumentType] (no declared attribute)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MyriadOutput:
        """Predict the token after each position.

        Args:
            input_ids: int64 of shape (B, S).
            attention_mask: of shape (B, cached + S), zero for padding.
            position_ids: of shape (B, S) or (1, S); None: those after the cache's.
            past_key_values: a cache that grows, such as `DynamicCache`; a mixture's own, if the model is one. This
                call's positions are appended.
            labels: of shape (B, S), unshifted: labels[b, s] is predicted from positions before s. Those of -100
                are not counted. The loss is the mean in nats, in training with the auxiliary loss added.
            use_cache: whether to return a cache where none is given; None: outside training.
            logits_to_keep: how many of the last positions, or which ones, to return logits of; 0: all.
            kwargs: options of transformers' loss, `num_items_in_batch` among them; others are ignored.

        Raises:
            ValueError: more positions than the context, a mask of another shape, or a cache that does not grow.
        """
        if getattr(past_key_values, "is_compileable", False):
            raise ValueError("past_key_values: a cache of fixed length is not supported; use a DynamicCache")
        if use_cache is None:
            use_cache = not (self.training or self.gradient_checkpointing)
        if past_key_values is None and use_cache:
            past_key_values = self._new_cache()
        mask = None if attention_mask is None else _padding_mask(attention_mask, input_ids, past_key_values)
        output = self.model(input_ids, positions=position_ids, cache=past_key_values, mask=mask)
        loss = None
        if labels is not None:
            loss = self.loss_function(output.logits, labels, vocab_size=self.config.vocab_size, **kwargs)
            loss = loss + output.aux_loss if self.training else loss
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return MyriadOutput(
            loss=loss,
            logits=output.logits[:, kept],
            past_key_values=past_key_values,
            aux_loss=None if labels is None else output.aux_loss,
            loads=output.loads if self.training else None,
        )

    def _new_cache(self) -> Any:
        return DynamicCache(config=self.config) if self._supports_default_dynamic_cache() else self.model.new_cache()

    def _supports_default_dynamic_cache(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """False for models that make a cache of their own: transformers then leaves it to `forward`."""
        return isinstance(self.model.new_cache(), LayerCache)

    def room_after(self, tokens: int) -> int:
        """How many tokens can follow so many.

        Raises:
            ContextError: none.
        """
        context = self.config.max_position_embeddings
        if tokens >= context:
            raise ContextError(f"a prompt of {tokens} tokens leaves no room in the model's context of {context}")
        return context - tokens

    def generate(  # pyright: ignore[reportIncompatibleMethodOverride] (transformers' further ones are passed on)
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Continue sequences of tokens, as `GenerationMixin.generate` does, up to the context and no further.

        Padding counts: it takes positions. A warning says where the context ended the text.

        Raises:
            ContextError: the prompt fills the context.
        """
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        given = 1 if ids is None else ids.shape[1]  # transformers begins with the end token where there is no prompt
        mask = kwargs.get("attention_mask")
        held = given if mask is None else max(given, mask.shape[-1])  # with a cache, the mask covers what it holds
        room = self.room_after(held)
        wanted = _wanted_tokens(given, kwargs, generation_config, self.generation_config)
        if wanted is not None and wanted > room:
            generation_config, kwargs = _limited(room, generation_config, kwargs)
        # Its `self` is a protocol that asks for attributes which models have under some circumstances only.
        result = super().generate(inputs, generation_config, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        sequences = result if isinstance(result, Tensor) else result.sequences
        if (wanted is None or wanted > room) and sequences.shape[1] - given >= room:
            warnings.warn(f"generation stopped at the model's context of {held + room} tokens", stacklevel=2)
        return result


def _intact(folder: Path) -> Path:
    """The folder to read from, its hashes verified, where they are known."""
    folder = intact_folder(folder)
    if "model" not in read_json(folder / "config.json"):
        raise CheckpointError(f"{folder / 'config.json'}: not a model of Myriad")
    if not any((folder / name).exists() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        raise CheckpointError(f"{folder}: holds no {SAFE_WEIGHTS_NAME}")
    return folder


def _refuse_misfit(source: object, info: Mapping[str, Any]) -> None:
    """Transformers makes up weights that a file lacks and goes on; a model of ours is loaded whole or not at all."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = [entry if isinstance(entry, str) else entry[0] for entry in info[kind]]  # a mismatch: with its shapes
        if names:
            first = ", ".join(sorted(names)[:3])
            raise CheckpointError(f"{source}: the weights do not fit its config: {kind.replace('_', ' ')} {first}")


def _padding_mask(attention_mask: Tensor, input_ids: Tensor, cache: Cache | None) -> Tensor | None:
    """A bool mask of shape (B, cached + S), False for padding; None without any, which lets attention be faster."""
    total = input_ids.shape[1] + (0 if cache is None else cache.get_seq_length())
    if attention_mask.shape != (len(input_ids), total):
        expected, found = (len(input_ids), int(total)), tuple(attention_mask.shape)
        raise ValueError(
            f"attention_mask: expected a shape of (batch, cached + new positions) = {expected}, not {found}"
        )
    mask = attention_mask.bool()
    return None if bool(mask.all()) else mask


def _wanted_tokens(given: int, kwargs: Mapping[str, Any], *configs: GenerationConfig | None) -> int | None:
    """How many new tokens a call of `generate` asks for: its own words, then its config, then the model's."""
    sources = [kwargs, *(vars(config) for config in configs if config is not None)]
    for name, before in (("max_new_tokens", 0), ("max_length", given)):
        for source in sources:
            if source.get(name) is not None:
                return source[name] - before
    return None


def _limited(
    room: int, config: GenerationConfig | None, kwargs: dict[str, Any]
) -> tuple[GenerationConfig | None, dict[str, Any]]:
    """The arguments of `generate` with at most so many new tokens.

    The limit stands where the caller's stood: transformers warns of a config and words at once, and of two limits.
    """
    if config is None or kwargs.keys() & {"max_new_tokens", "max_length"}:
        return config, {name: value for name, value in kwargs.items() if name != "max_length"} | {
            "max_new_tokens": room
        }
    config = copy.deepcopy(config)
    config.max_new_tokens, config.max_length = room, None
    return config, kwargs
