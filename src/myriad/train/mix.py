"""Mixing: separately trained experts in, one model out.

The result is a Hugging Face folder whose weights lie in shards: some for what the experts share, and some for each
expert alone, so that one of them can be opened without reading the others. Tensors go from the experts' files to the
shards one shard at a time: memory is bounded by a shard, whatever the number of experts.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from myriad import checkpoint
from myriad.checkpoint import MANIFEST, PREFIX, WEIGHTS_INDEX, CheckpointError, Manifest, intact_folder
from myriad.config import ConfigError, first_difference, validate
from myriad.data.clusters import Clusters
from myriad.data.place import new_folder
from myriad.data.tokenizer import FILE_NAME
from myriad.ffn import DenseConfig
from myriad.models import (
    ClusterRouting,
    ExpertChoiceRouting,
    ExpertRouting,
    LanguageModel,
    PosteriorRouting,
    Transformer,
    TransformerConfig,
    TransformerExpertsConfig,
)
from myriad.train.run import DataConfig, RunConfig

SHARD_BYTES = 5 * 10**9
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4}
"""By the names of safetensors."""
CLUSTER_TENSORS = ("clusters.idf", "clusters.components", "clusters.centers")
MAY_DIFFER = ("dropout",)
"""Settings of experts that no weight depends on."""


class Sizes(NamedTuple):
    """What a tensor is, known without reading it."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Expert:
    """A trained expert, of which nothing but names has been read.

    Attributes:
        run: as the user named it.
        folder: where its files are read from.
        config: the transformer's.
        files: tensor name -> its file.
        sizes: tensor name -> what it is.
        tokenizer: the hash of its tokenizer; None: it has none.
    """

    run: Path
    folder: Path
    config: TransformerConfig
    files: dict[str, Path]
    sizes: dict[str, Sizes]
    tokenizer: str | None

    @classmethod
    def open(cls, run: Path) -> "Expert":
        """Open a run folder, a checkpoint or a Hugging Face folder.

        Raises:
            MyriadError: not there, damaged, or another kind of model.
        """
        folder = intact_folder(run)
        config = checkpoint.read_config(folder)
        if not isinstance(config, TransformerConfig):
            raise ConfigError(f"{run}: model.kind: an expert is a transformer, not {config.model_dump()['kind']}")
        files = checkpoint.weight_files(folder)
        sizes: dict[str, Sizes] = {}
        for path in sorted(set(files.values())):
            with checkpoint.opened_tensors(path) as file:
                found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
                sizes |= {name: Sizes(part.get_dtype(), tuple(part.get_shape())) for name, part in found.items()}
        path = folder / FILE_NAME
        tokenizer = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None
        return cls(run, folder, config, _without_prefix(files), _without_prefix(sizes), tokenizer)

    @property
    def document_start(self) -> int | None:
        """The token that stood before each document of its text, where its folder says so."""
        return checkpoint.read_json(self.folder / "config.json").get("bos_token_id")

    def read(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            CheckpointError: it is damaged, or not finite.
        """
        with checkpoint.opened_tensors(self.files[name]) as file:
            value: Tensor = file.get_tensor(PREFIX + name)
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise CheckpointError(f"{self.run}: the weights are broken ({name} is not finite)")
        return value


V = TypeVar("V")


def _without_prefix(named: Mapping[str, V]) -> dict[str, V]:
    return {name.removeprefix(PREFIX): value for name, value in named.items()}


class Layout(Protocol):
    """Where the tensors of an expert go."""

    def name(self, expert: int, name: str) -> str:
        """What an expert's tensor is called in the mixture; the same name for all experts where they share it."""
        ...

    def mixture(self, whole: TransformerConfig) -> TransformerConfig:
        """The config of an expert in the mixture, made of that of one that was trained alone.

        Raises:
            ConfigError: there can be none.
        """
        ...

    def whole(self, config: TransformerExpertsConfig) -> TransformerConfig:
        """The config of an expert that stands alone again."""
        ...


class Apart:
    """Experts that share nothing."""

    def name(self, expert: int, name: str) -> str:
        return f"experts.{expert}.{name}"

    def mixture(self, whole: TransformerConfig) -> TransformerConfig:
        return whole

    def whole(self, config: TransformerExpertsConfig) -> TransformerConfig:
        return config.expert.model_copy(update={"vocab_size": config.vocabulary})


class Grown:
    """Experts grown from one seed model: their first blocks are the trunk; embedding, head and last norm are shared."""

    def __init__(self, trunk_layers: int):
        self._trunk = trunk_layers

    def name(self, expert: int, name: str) -> str:
        first, _, rest = name.partition(".")
        if first != "blocks":
            return name
        block, _, rest = rest.partition(".")
        layer = int(block) - self._trunk
        return f"trunk.{block}.{rest}" if layer < 0 else f"experts.{expert}.{layer}.{rest}"

    def mixture(self, whole: TransformerConfig) -> TransformerConfig:
        layers = whole.layers - self._trunk
        if layers < 1:
            raise ConfigError(
                f"routing.trunk_layers: {self._trunk} of the experts' {whole.layers} blocks leave none to choose"
            )
        if len(set(whole.placement)) > 1:
            raise ConfigError(
                "model.pattern: the blocks of experts that choose are of one kind; use --routing posterior"
            )
        return whole.model_copy(update={"layers": layers})

    def whole(self, config: TransformerExpertsConfig) -> TransformerConfig:
        changes = {"vocab_size": config.vocabulary, "layers": config.expert.layers + self._trunk}
        return config.expert.model_copy(update=changes)


def layout_of(routing: ExpertRouting) -> Layout:
    """Where a routing has its experts' tensors."""
    return Grown(routing.trunk_layers) if isinstance(routing, ExpertChoiceRouting) else Apart()


class Piece(NamedTuple):
    """A tensor of the mixture, and where it comes from."""

    name: str
    source: Callable[[], Tensor]
    bytes: int


def mix(
    runs: Sequence[Path],
    out: str | Path,
    routing: ExpertRouting,
    *,
    clusters: Clusters | None = None,
    data: Path | None = None,
) -> None:
    """Make one model of separately trained ones.

    Args:
        runs: run folders, checkpoints or Hugging Face folders: an expert each.
        out: the folder; it must not exist, or be empty.
        routing: how the mixture shares a text among them; the number of features is that of `clusters`, and the token
            that begins a document that of the experts' texts.
        clusters: what the experts were trained on, in their order; routing by clusters needs it.
        data: the store that the mixture is evaluated on if no other is named; None: that which was divided.

    Raises:
        ConfigError: experts that differ in shape or tokenizer, or do not fit the routing; it names the first.
        MyriadError: a run is missing or damaged, or `out` is taken or cannot be written.
    """
    if len(runs) < 2:
        raise ConfigError(f"a mixture needs two experts or more, found {len(runs)}")
    experts = [Expert.open(run) for run in runs]
    for other in experts[1:]:
        _refuse_other(experts[0], other)
    if clusters is not None:
        _refuse_other_clusters(experts, clusters)
    if clusters is not None and isinstance(routing, ClusterRouting):
        routing = routing.model_copy(update={"features": clusters.model.centers_CR.shape[1]})
    if isinstance(routing, PosteriorRouting) and routing.document_start is None:
        routing = routing.model_copy(update={"document_start": experts[0].document_start})
    layout = layout_of(routing)
    first = layout.mixture(experts[0].config)
    settings = {"vocab_size": first.vocab_size, "context": first.context, "experts": len(experts)}
    config = validate(TransformerExpertsConfig, settings | {"expert": first, "routing": routing})
    _refuse_unshared(experts, layout)
    groups = [*_pieces(experts, layout)]
    groups[0] += _own_pieces(config, {piece.name for group in groups for piece in group}, clusters)
    if data is None and clusters is not None and clusters.index.store is not None:
        data = Path(clusters.index.store)
    with new_folder(Path(os.path.abspath(out))) as folder:
        _write_weights(folder, groups)
        _describe(folder, config, experts[0], data)
        Manifest(files=checkpoint.hash_folder(folder), checkpoint="mixture").write(folder / MANIFEST)


def _refuse_other(first: Expert, other: Expert) -> None:
    """Experts are of one shape and read the same tokens."""
    if other.tokenizer != first.tokenizer:
        raise ConfigError(f"{other.run}: tokenizer.json: another tokenizer than that of {first.run}")
    mine, theirs = (
        {name: value for name, value in expert.config.model_dump(mode="json").items() if name not in MAY_DIFFER}
        for expert in (other, first)
    )
    if mine != theirs:
        raise ConfigError(f"{other.run}: model.{first_difference(mine, theirs)}, as {first.run} has it")
    for name in sorted({*first.sizes, *other.sizes}):
        if other.sizes.get(name) != first.sizes.get(name):
            found, expected = (_show(expert.sizes.get(name)) for expert in (other, first))
            raise ConfigError(f"{other.run}: {name}: {found} instead of {expected}, as {first.run} has it")


def _show(sizes: Sizes | None) -> str:
    return "missing" if sizes is None else f"{sizes.dtype} of shape {list(sizes.shape)}"


def _refuse_other_clusters(experts: Sequence[Expert], clusters: Clusters) -> None:
    index, first = clusters.index, experts[0]
    if len(index.clusters) != len(experts):
        raise ConfigError(
            f"--clusters: {clusters.path} has {len(index.clusters)} clusters, and there are {len(experts)} experts"
        )
    if first.tokenizer is not None and first.tokenizer != index.tokenizer_sha256:
        raise ConfigError(f"--clusters: {clusters.path} was made with another tokenizer than {first.run}")
    if index.vocab_size > first.config.vocabulary:
        raise ConfigError(
            f"--clusters: {clusters.path} has a vocabulary of {index.vocab_size}, {first.run} one of "
            f"{first.config.vocabulary}"
        )


def _refuse_unshared(experts: Sequence[Expert], layout: Layout) -> None:
    """What a mixture has once must be the same in all its experts, bit for bit."""
    first = experts[0]
    shared = [name for name in first.files if layout.name(0, name) == layout.name(1, name)]
    for other in experts[1:]:
        for name in shared:
            mine, theirs = other.read(name), first.read(name)
            if not torch.equal(mine.flatten().view(torch.uint8), theirs.flatten().view(torch.uint8)):
                raise ConfigError(
                    f"{other.run}: {name} is not that of {first.run}: experts that choose are grown from one seed "
                    "model with embedding, head, last norm and trunk frozen; use --routing posterior"
                )


def _pieces(experts: Sequence[Expert], layout: Layout) -> Iterator[list[Piece]]:
    """What the experts share, and then what each has for itself."""
    first = experts[0]
    yield [_piece(first, 0, name, layout) for name in first.files if layout.name(0, name) == layout.name(1, name)]
    for number, expert in enumerate(experts):
        own = [name for name in expert.files if layout.name(0, name) != layout.name(1, name)]
        yield [_piece(expert, number, name, layout) for name in own]


def _piece(expert: Expert, number: int, name: str, layout: Layout) -> Piece:
    dtype, shape = expert.sizes[name]
    return Piece(layout.name(number, name), partial(expert.read, name), math.prod(shape) * ITEM_BYTES.get(dtype, 1))


def _own_pieces(config: TransformerExpertsConfig, given: set[str], clusters: Clusters | None) -> list[Piece]:
    """What a mixture has beside its experts: a cluster model, a router that is yet to be trained."""
    with torch.device("meta"):
        names = config.build().state_dict().keys() - given
    fresh = _stand_in(config).state_dict()
    found = {name: fresh[name] for name in sorted(names)}
    if names & set(CLUSTER_TENSORS):
        if clusters is None:
            raise ConfigError(
                "--clusters: missing; routing by clusters needs the folder that `myriad data cluster` made"
            )
        found |= _cluster_tensors(clusters, config.vocabulary)
    return [Piece(name, partial(_just, value), value.nbytes) for name, value in found.items()]


def _just(value: Tensor) -> Tensor:
    return value


def _stand_in(config: TransformerExpertsConfig) -> LanguageModel:
    """A model whose experts are as small as can be, and everything else of the right size."""
    changes = {"layers": 1, "ffns": {"dense": DenseConfig(d_hidden=1)}, "pattern": ["dense"], "tables": {}}
    expert = config.expert.model_copy(update=changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return config.model_copy(update={"expert": expert, "vocab_size": 2}).build()


def _cluster_tensors(clusters: Clusters, vocabulary: int) -> dict[str, Tensor]:
    """The cluster model; ids beyond its vocabulary, which no text has, count nothing."""
    features, missing = clusters.model.features, vocabulary - clusters.index.vocab_size
    idf_V = torch.nn.functional.pad(torch.from_numpy(features.idf_V), (0, missing))
    components_RV = torch.nn.functional.pad(torch.from_numpy(features.components_RV), (0, missing))
    return dict(zip(CLUSTER_TENSORS, (idf_V, components_RV, torch.from_numpy(clusters.model.centers_CR)), strict=True))


def _write_weights(folder: Path, groups: Sequence[Sequence[Piece]]) -> None:
    """Write all tensors, no two groups in one file, and the index that says which is where."""
    shards = [shard for group in groups for shard in _shards(group)]
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / name, shard)
        placed |= {PREFIX + piece.name: name for piece in shard}
    total = sum(piece.bytes for shard in shards for piece in shard)
    checkpoint.write_json(folder / WEIGHTS_INDEX, {"metadata": {"total_size": total}, "weight_map": placed})


def _write_shard(path: Path, shard: Sequence[Piece]) -> None:
    """A function, so that one shard's tensors are gone before the next one's are read."""
    tensors = {PREFIX + piece.name: piece.source().contiguous() for piece in shard}
    save_file(tensors, path, metadata={"format": "pt"})


def _shards(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    shard: list[Piece] = []
    for piece in pieces:
        if shard and sum(held.bytes for held in shard) + piece.bytes > SHARD_BYTES:
            yield shard
            shard = []
        shard.append(piece)
    if shard:
        yield shard


def _describe(folder: Path, config: TransformerExpertsConfig, expert: Expert, data: Path | None) -> None:
    """Write what says what the weights are, and what the mixture is evaluated on."""
    tokenizer = expert.folder / FILE_NAME
    raw = checkpoint.read_json(expert.folder / "config.json")
    dtype = getattr(torch, str(raw.get("dtype", "float32")))
    end_id = raw.get("eos_token_id")
    checkpoint.write_description(folder, config, dtype, tokenizer if tokenizer.exists() else None, end_id)
    if data is not None and (expert.folder / "run.json").exists():
        run = validate(RunConfig, checkpoint.read_json(expert.folder / "run.json"))
        optim = run.optim.model_copy(update={"frozen": []})  # names of an expert's parameters
        changes = {"model": config, "data": DataConfig(path=str(data)), "optim": optim, "init": None, "out": None}
        checkpoint.write_json(folder / "run.json", run.model_copy(update=changes).model_dump(mode="json"))


def load_expert(mixture: str | Path, index: int, device: str | torch.device = "cpu") -> Transformer:
    """Open one expert of a mixture as a language model of its own, in eval mode.

    Of the files of `mix`, only those that hold the expert, or what all share, are read and compared with their hashes.

    Raises:
        ConfigError: the mixture has no such expert.
        CheckpointError: the folder holds no mixture, or what is read is damaged.
    """
    folder = Path(mixture)
    config = checkpoint.read_config(folder if (folder / "config.json").exists() else intact_folder(folder))
    if not isinstance(config, TransformerExpertsConfig):
        raise CheckpointError(f"{folder}: no mixture of transformers")
    if not 0 <= index < config.experts:
        raise ConfigError(f"{folder}: has experts 0 to {config.experts - 1}, and no {index}")
    layout = layout_of(config.routing)
    with torch.device("meta"):
        expert = Transformer(layout.whole(config))
    files = checkpoint.weight_files(folder)
    names = {name: PREFIX + layout.name(index, name) for name in expert.state_dict()}
    missing = [name for name in names.values() if name not in files]
    if missing:
        raise CheckpointError(f"{folder}: the weights do not fit its config: missing {missing[0]}")
    _verify(folder, {files[name] for name in names.values()})
    state: dict[str, Tensor] = {}
    for path in sorted({files[name] for name in names.values()}):
        with checkpoint.opened_tensors(path) as file:
            state |= {name: file.get_tensor(placed) for name, placed in names.items() if files[placed] == path}
    expert.load_state_dict(state, assign=True)
    return expert.to(device).eval()


def _verify(folder: Path, files: set[Path]) -> None:
    """Compare some files with their hashes, where these are known."""
    known = next((name for name in (MANIFEST, checkpoint.INDEX) if (folder / name).exists()), None)
    if known is not None:
        manifest = Manifest.read(folder / known)
        for path in files:
            checkpoint.verify(folder, manifest, only=path.name)
