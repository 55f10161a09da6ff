"""Run folders that survive: atomic, hashed, self-describing, readable by Hugging Face's tools.

    RUN/
      run.json  config.json  model.safetensors  tokenizer.json   the best weights (else the last), hard links
      index.json                          which checkpoint that is, and the hashes; replaced last
      checkpoints/00000100/               the same files, and
        training/                         the optimizer's moments, counters
        manifest.json                     size and SHA-256 of every file
      metrics.jsonl  sessions.jsonl       written by the training loop, sealed in every checkpoint's counters

A checkpoint is written into a temporary folder, synced, and renamed: it is whole or absent. Nothing is ever
unpickled: safetensors and JSON only.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from myriad.config import Config, MyriadError, RunError, describe
from myriad.models import LanguageModel, ModelConfig

MANIFEST, INDEX, CHECKPOINTS, TRAINING = "manifest.json", "index.json", "checkpoints", "training"
MAX_SHARD_SIZE = "5GB"
WEIGHTS_INDEX = "model.safetensors.index.json"
PREFIX = "model."
"""Of the names of a model's tensors in files."""


class CheckpointError(MyriadError):
    """A run folder that is missing, incomplete or damaged; the text names the file."""


class FileEntry(Config):
    size: int
    sha256: str


class Manifest(Config):
    """What a folder must hold. `digest` is the hash of the rest, so that the manifest guards itself."""

    files: dict[str, FileEntry]
    checkpoint: str
    """The name of the checkpoint that the files belong to."""
    best: str | None = None
    """In a run's index: the checkpoint with the lowest validation loss."""

    def write(self, path: Path) -> None:
        """Write the file, replacing an older one at once."""
        content = self.model_dump(mode="json")
        content["digest"] = _digest(content)
        temporary = path.with_name(f".{path.name}.tmp")
        with naming(path):
            temporary.write_text(json.dumps(content, indent=1) + "\n")
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read and check the file.

        Raises:
            CheckpointError: missing, or not what was written.
        """
        try:
            content = json.loads(path.read_bytes())
            digest = content.pop("digest")
            manifest = cls.model_validate(content)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: missing; this is no complete run or checkpoint") from None
        except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
            raise CheckpointError(f"{path}: damaged") from None
        if digest != _digest(content):
            raise CheckpointError(f"{path}: damaged (its own hash does not agree)")
        return manifest


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let the error of a write to a file name the file, which the system's own does not."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror})") from None


def hash_file(path: Path) -> FileEntry:
    """A file's size and SHA-256."""
    with path.open("rb") as file:
        return FileEntry(size=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def hash_folder(folder: Path) -> dict[str, FileEntry]:
    """What a manifest says of a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in paths}


def verify(folder: Path, manifest: Manifest, only: str | None = None) -> None:
    """Compare a folder's files with a manifest.

    Args:
        folder: the folder.
        manifest: what it must hold.
        only: the one file to compare; None: all.

    Raises:
        CheckpointError: names the first file that is missing, of another size, or of another hash.
    """
    for name, expected in manifest.files.items():
        path = folder / name
        if only not in (None, name):
            continue
        try:
            if path.stat().st_size != expected.size:
                raise CheckpointError(f"{path}: damaged ({path.stat().st_size} bytes, not {expected.size})")
            if hash_file(path) != expected:
                raise CheckpointError(f"{path}: damaged (its SHA-256 does not agree)")
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


# Writing


def write_model(folder: Path, model: LanguageModel, tokenizer: Path | None, end_id: int | None) -> None:
    """Write a model as a Hugging Face folder.

    Args:
        folder: exists.
        model: its parameters and buffers are written in their own dtypes.
        tokenizer: a `tokenizer.json` to copy.
        end_id: the token between documents.
    """
    write_description(folder, model.config, next(model.parameters()).dtype, tokenizer, end_id)
    state = {f"{PREFIX}{name}": value for name, value in model.state_dict().items()}
    save_torch_state_dict(state, folder, max_shard_size=MAX_SHARD_SIZE)


def write_description(
    folder: Path, model: ModelConfig, dtype: torch.dtype, tokenizer: Path | None, end_id: int | None
) -> None:
    """Write all files of a Hugging Face folder but the weights.

    Args:
        folder: exists.
        model: what the weights are of.
        dtype: theirs.
        tokenizer: a `tokenizer.json` to copy.
        end_id: the token between documents.
    """
    config = {
        "model_type": "myriad",
        "architectures": ["MyriadForCausalLM"],
        "dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": end_id,
        "eos_token_id": end_id,
        "model": model.model_dump(mode="json"),
    }
    write_json(folder / "config.json", config)
    if tokenizer is not None:
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
        end = "<|endoftext|>"
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": end,
            "eos_token": end,
            "pad_token": end,
            "split_special_tokens": True,  # a literal <|endoftext|> in a text stays text
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.context,
        }
        write_json(folder / "tokenizer_config.json", settings)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def save_checkpoint(
    run: Path,
    step: int,
    model: LanguageModel,
    *,
    run_config: Mapping[str, Any],
    tokenizer: Path | None,
    end_id: int | None,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
) -> Path:
    """Write one whole checkpoint; a kill at any moment leaves it absent.

    Args:
        run: the run folder.
        step: its number.
        run_config: the settings, for `run.json`.
        tensors: file name -> tensors, for `training/NAME.safetensors`.
        state: counters, for `training/state.json`.

    Raises:
        RunError: a file cannot be written.
    """
    checkpoints = run / CHECKPOINTS
    checkpoints.mkdir(parents=True, exist_ok=True)
    name = f"{step:08d}"
    temporary = checkpoints / f".{name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / TRAINING).mkdir(parents=True)
    try:
        write_model(temporary, model, tokenizer, end_id)
        for file, named in tensors.items():
            whole = {key: value.contiguous() for key, value in named.items()}
            save_file(whole, temporary / TRAINING / f"{file}.safetensors")
        write_json(temporary / "run.json", run_config)
        write_json(temporary / TRAINING / "state.json", state)
        for path in temporary.rglob("*"):
            sync(path)
        Manifest(files=hash_folder(temporary), checkpoint=name).write(temporary / MANIFEST)
    except (OSError, SafetensorError) as error:  # of a full disk, a library makes errors of its own
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{temporary}: cannot be written ({reason}); earlier checkpoints are kept") from None
    final = checkpoints / name
    if final.exists():  # a damaged one, or one of a run that was resumed from before it
        shutil.rmtree(final)
    os.replace(temporary, final)
    sync(checkpoints)
    return final


def publish(run: Path, shown: Path, best: Path | None) -> None:
    """Let the run folder itself show a checkpoint's weights; the index that says so comes last."""
    manifest = Manifest.read(shown / MANIFEST)
    files = {name: entry for name, entry in manifest.files.items() if not name.startswith(f"{TRAINING}/")}
    for name in files:
        temporary = run / f".{name}.tmp"
        temporary.unlink(missing_ok=True)
        try:
            os.link(shown / name, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(shown / name, temporary)
        os.replace(temporary, run / name)
    index = Manifest(files=files, checkpoint=shown.name, best=best.name if best is not None else None)
    index.write(run / INDEX)


def prune(run: Path, keep: int, newest: Path, best: Path | None) -> None:
    """Delete all but the last checkpoints up to `newest` and the best, and what killed saves left behind.

    Later ones than `newest` are damaged, as it was resumed from: they neither count nor go.
    """
    present = [folder for folder in list_checkpoints(run) if folder.name <= newest.name]
    for folder in present[:-keep]:
        if folder != best:
            shutil.rmtree(folder)
    for leftover in (run / CHECKPOINTS).glob(".*.tmp"):
        shutil.rmtree(leftover)


# Reading


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, whole or damaged."""
    folders = (run / CHECKPOINTS).glob("[0-9]" * 8) if (run / CHECKPOINTS).is_dir() else ()
    return sorted(folder for folder in folders if folder.is_dir())


def intact_checkpoints(run: Path) -> Iterator[tuple[Path, CheckpointError | None]]:
    """Checkpoints, newest first, each with what is wrong with it, or None."""
    for folder in reversed(list_checkpoints(run)):
        try:
            verify(folder, Manifest.read(folder / MANIFEST))
            yield folder, None
        except CheckpointError as error:
            yield folder, error


def newest_file(run: Path, name: str) -> Path:
    """A file of the newest checkpoint that has it intact, whatever became of the others; else the run's own."""
    for folder in reversed(list_checkpoints(run)):
        try:
            verify(folder, Manifest.read(folder / MANIFEST), only=name)
            return folder / name
        except CheckpointError:
            continue
    return run / name


def intact_folder(folder: Path) -> Path:
    """The folder to read a model from: a checkpoint, a Hugging Face folder, or a run's shown weights.

    Raises:
        CheckpointError: not there, or damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such run folder")
    if (folder / MANIFEST).exists():
        verify(folder, Manifest.read(folder / MANIFEST))
    elif (folder / INDEX).exists():
        index = Manifest.read(folder / INDEX)
        try:
            verify(folder, index)
        except CheckpointError:
            # A run that was killed while it replaced the links: the checkpoint that they lead to is whole.
            shown = folder / CHECKPOINTS / index.checkpoint
            verify(shown, Manifest.read(shown / MANIFEST))
            return shown
    elif checkpoints := list_checkpoints(folder):  # a run that was killed before its first index
        return intact_folder(checkpoints[-1])
    elif not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: holds no model (no config.json, no checkpoints)")
    return folder


def fingerprint(folder: Path) -> str | None:
    """What names the content of a folder that is whole: its manifest's digest; None: it has no manifest."""
    for name in (MANIFEST, INDEX):
        if (folder / name).exists():
            return str(read_json(folder / name)["digest"])
    return None


def read_json(path: Path) -> dict[str, Any]:
    """Read a mapping.

    Raises:
        CheckpointError: missing, or not a mapping.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except (OSError, ValueError, RecursionError):
        raise CheckpointError(f"{path}: damaged (not JSON)") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: damaged (not a mapping)")
    return content


@contextmanager
def opened_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file, of which tensors are read one by one.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: missing or damaged.
    """
    with opened_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def weight_files(folder: Path) -> dict[str, Path]:
    """The file that holds each of a model's tensors, by the tensor's name in the file; nothing is read but names.

    Raises:
        CheckpointError: the index or the one file is missing or damaged.
    """
    index = folder / WEIGHTS_INDEX
    if not index.exists():
        path = folder / "model.safetensors"
        with opened_tensors(path) as file:
            return dict.fromkeys(file.keys(), path)
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
        raise CheckpointError(f"{index}: damaged (no weight_map)")
    return {name: folder / Path(file).name for name, file in placed.items()}


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The state of the model in a folder, from one file or from shards."""
    state: dict[str, Tensor] = {}
    for path in sorted(set(weight_files(folder).values())):
        state |= read_tensors(path)
    return {name.removeprefix(PREFIX): value for name, value in state.items()}


def load_weights(model: LanguageModel, folder: Path) -> None:
    """Give a model the weights of a folder.

    Raises:
        CheckpointError: a file is damaged, or names and shapes are not the model's.
    """
    try:
        model.load_state_dict(read_weights(folder), assign=next(model.parameters()).is_meta)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise CheckpointError(f"{folder}: the weights do not fit its config: {' '.join(lines[:2])}") from None


def refuse_broken_weights(model: nn.Module, where: str | Path) -> None:
    """Refuse weights that hold NaN or infinity: everything that is computed with them is worthless.

    Args:
        model: its parameters and buffers are looked through.
        where: names it in the error.

    Raises:
        CheckpointError: names the first tensor that is not finite.
    """
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise CheckpointError(f"{where}: the weights are broken ({name} is not finite)")


def read_config(folder: Path) -> ModelConfig:
    """The config of the model in a folder.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    raw = read_json(folder / "config.json").get("model")
    if raw is None:
        raise CheckpointError(f"{folder / 'config.json'}: not a model of Myriad")
    try:
        return ModelConfig.model_validate(raw)
    except ValidationError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {'; '.join(describe(error))}") from None


def load(run: str | Path, device: str | torch.device = "cpu") -> LanguageModel:
    """Open the model of a run folder, a checkpoint or a Hugging Face folder, in eval mode.

    Args:
        run: the folder. A run shows its best weights, or the last where it never validated.
        device: where to put the model.

    Raises:
        CheckpointError: not there, or damaged.
    """
    folder = intact_folder(Path(run))
    config = read_config(folder)
    with torch.device("meta"):  # every tensor comes from the file: none need be made first
        model = config.build()
    load_weights(model, folder)
    return model.to(device).eval()
