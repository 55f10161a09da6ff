import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from myriad import checkpoint
from myriad.checkpoint import CheckpointError, FileEntry, Manifest, intact_checkpoints, intact_folder, load
from myriad.config import RunError
from myriad.data.tokenizer import byte_tokenizer
from myriad.ffn import PEERConfig
from myriad.models import LanguageModel, TransformerConfig
from myriad.train import fit
from myriad.train.record import CLOCK_FIELDS, Silent, read_records
from myriad.train.run import BudgetConfig, CheckpointConfig
from tiny import tiny_run


def make_model(seed: int) -> LanguageModel:
    """A PEER transformer with batch norm buffers that have moved and tables in bfloat16."""
    torch.manual_seed(seed)
    peer = PEERConfig(experts=16, heads=2, experts_per_head=2, d_key=4)
    shape = TransformerConfig(vocab_size=257, context=8, layers=2, d_model=8, heads=2, ffns={"p": peer}, pattern=["p"])
    model = shape.build()
    model(torch.randint(257, (4, 8)))
    for block in model.blocks:
        block.ffn.experts_up.data = block.ffn.experts_up.data.bfloat16()
    return model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save(folder)
    return folder / "tokenizer.json"


@pytest.fixture
def save(tokenizer) -> Callable[..., Path]:
    """Save a checkpoint as the training loop does: write, show, prune."""

    def save(run: Path, step: int, model: LanguageModel, keep: int = 2) -> Path:
        written = checkpoint.save_checkpoint(
            run,
            step,
            model,
            run_config={"any": "thing"},
            tokenizer=tokenizer,
            end_id=256,
            tensors={"optimizer": {"m": torch.full((5,), float(step))}},
            state={"step": step},
        )
        checkpoint.publish(run, written, None)
        checkpoint.prune(run, keep, written, None)
        return written

    return save


def bits(state: dict[str, Tensor]) -> dict[str, tuple]:
    """What two states must agree in to be the same to the last bit."""
    return {
        name: (value.dtype, tuple(value.shape), bytes(value.contiguous().view(-1).view(torch.uint8).numpy()))
        for name, value in state.items()
    }


def same(one: LanguageModel, other: LanguageModel) -> bool:
    return bits(one.state_dict()) == bits(other.state_dict())


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def unlinked_copy(run: Path, to: Path) -> Path:
    """A copy in which no two names share a file."""
    shutil.copytree(run, to)
    return to


# What comes back


def test_tables_buffers_and_dtypes_come_back_to_the_last_bit(save, tmp_path):
    model = make_model(0)
    model.blocks[0].ffn.experts_down.data[0, :4] = torch.tensor([-0.0, float("inf"), float("nan"), 1e-45])
    save(tmp_path, 1, model)
    restored = load(tmp_path)
    names = restored.state_dict().keys()
    assert any("running_mean" in name for name in names)
    assert {value.dtype for value in restored.state_dict().values()} == {torch.bfloat16, torch.float32}
    assert same(model, restored)
    assert not restored.training


def test_shards_hold_the_same_weights_and_each_is_needed(save, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_SHARD_SIZE", 2000)
    model = make_model(0)
    written = save(tmp_path, 1, model)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert not (tmp_path / "model.safetensors").exists()
    assert same(model, load(tmp_path))
    assert same(model, load(written))
    shards[1].unlink()
    assert same(model, load(tmp_path))  # the checkpoint that the links lead to is whole
    (written / shards[1].name).unlink()
    with pytest.raises(CheckpointError, match=shards[1].name):
        load(tmp_path)


def test_a_plain_hugging_face_folder_without_manifest_loads(save, tmp_path):
    model = make_model(0)
    written = save(tmp_path / "run", 1, model)
    (tmp_path / "plain").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(written / name, tmp_path / "plain")
    assert same(model, load(tmp_path / "plain"))


def complaint(folder: Path) -> str:
    """What `load` says of a folder; nothing if it loads. Any other exception is a failure."""
    try:
        load(folder)
    except CheckpointError as error:
        return str(error)
    return ""


def test_damage_to_a_folder_without_hashes_is_one_clear_line_or_harmless(save, tmp_path):
    written = save(tmp_path / "run", 1, make_model(0))
    dice = random.Random(0)
    noticed = 0
    for name in ("config.json", "model.safetensors"):
        whole = (written / name).read_bytes()
        structured = len(whole) if name == "config.json" else 8 + int.from_bytes(whole[:8], "little")
        for _ in range(150):
            folder = tmp_path / "plain"
            folder.mkdir(exist_ok=True)
            for other in ("config.json", "model.safetensors"):
                shutil.copy(written / other, folder)
            broken = bytearray(whole)
            broken[dice.randrange(structured)] ^= 1 << dice.randrange(8)
            (folder / name).write_bytes(broken)
            said = complaint(folder)
            noticed += bool(said)
            assert not said or (str(folder) in said and "\n" not in said)
    assert noticed > 100


def test_nothing_is_pickled(store, tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickle")

    for module, name in [(torch, "save"), (torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")]:
        monkeypatch.setattr(module, name, refuse)
    run = tiny_run(store, budget=BudgetConfig(steps=4), checkpoint=CheckpointConfig(every=2))
    fit(run, tmp_path / "run")
    fit(run.model_copy(update={"budget": BudgetConfig(steps=6)}), tmp_path / "run", resume=True)
    load(tmp_path / "run")
    suffixes = {path.suffix for path in files_of(tmp_path / "run") if path.name != ".lock"}
    assert suffixes == {".json", ".jsonl", ".safetensors"}
    for path in files_of(tmp_path / "run"):
        if path.suffix != ".safetensors":
            [json.loads(line) for line in ([path.read_text()] if path.suffix == ".json" else path.open())]


# What is missing


def test_a_missing_folder_a_file_and_an_empty_folder_are_told_apart(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name, reason in [("none", "no such run folder"), ("file", "no such run folder"), ("empty", "holds no model")]:
        with pytest.raises(CheckpointError, match=f"{name}: {reason}"):
            load(tmp_path / name)


def test_a_folder_of_another_model_type_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match=r"config.json: not a model of Myriad"):
        load(tmp_path)


# Damage is noticed


def damages(content: bytes, dice: random.Random, flips: int):
    """Ways to damage a file: shortened, grown, or with one bit flipped."""
    for size in sorted({0, 1, len(content) // 2, len(content) - 2} - {len(content)}):
        if size < len(content):
            yield f"cut to {size}", content[:size]
    yield "a byte more", content + b"}"
    for position in [0, len(content) - 2, *(dice.randrange(len(content)) for _ in range(flips))]:
        bit = dice.randrange(8)
        flipped = bytearray(content)
        flipped[position] ^= 1 << bit
        yield f"bit {bit} of byte {position}", bytes(flipped)


def test_damage_to_any_file_of_a_checkpoint_is_noticed_and_names_the_file(save, tmp_path):
    written = save(tmp_path / "run", 1, make_model(0))
    folder = unlinked_copy(written, tmp_path / "copy")
    dice = random.Random(0)
    assert len(files_of(folder)) == 8
    for path in files_of(folder):
        whole = path.read_bytes()
        for how, broken in damages(whole, dice, flips=12):
            path.write_bytes(broken)
            for read in (load, intact_folder):
                with pytest.raises(CheckpointError) as error:
                    read(folder)
                assert str(error.value).startswith(f"{path}: "), how
                assert "\n" not in str(error.value)
        if path.name != "manifest.json":  # without one, it is a plain folder
            path.unlink()
            with pytest.raises(CheckpointError, match=path.name):
                intact_folder(folder)
        path.write_bytes(whole)
    assert intact_folder(folder) == folder


def test_damage_to_a_shown_file_falls_back_to_its_checkpoint_and_damage_to_both_is_noticed(save, tmp_path):
    model = make_model(0)
    save(tmp_path / "run", 1, model)
    copy = unlinked_copy(tmp_path / "run", tmp_path / "copy")
    dice = random.Random(1)
    shown = [path for path in copy.iterdir() if path.is_file() and path.name != "index.json"]
    assert len(shown) == 5
    for path in shown:
        whole = path.read_bytes()
        for _, broken in damages(whole, dice, flips=4):
            path.write_bytes(broken)
            assert same(model, load(copy))
            twin = copy / "checkpoints" / "00000001" / path.name
            twin.write_bytes(broken)
            with pytest.raises(CheckpointError) as error:
                load(copy)
            assert str(error.value).startswith(f"{twin}: ")
            twin.write_bytes(whole)
        path.write_bytes(whole)


def test_a_links_damage_in_place_is_noticed_though_both_names_share_it(save, tmp_path):
    save(tmp_path, 1, make_model(0))
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(2000)
        file.write(b"\xff\x00\xff")
    with pytest.raises(CheckpointError, match=r"model.safetensors: damaged \(its SHA-256"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "index.json"])
def test_every_flipped_bit_of_a_manifest_is_noticed(tmp_path, name):
    entries = {file: FileEntry(size=1234, sha256="0af9" * 16) for file in ("config.json", "training/state.json")}
    path = tmp_path / name
    Manifest(files=entries, checkpoint="00000012", best="00000008").write(path)
    whole = path.read_bytes()
    assert Manifest.read(path).files == entries
    for position in range(len(whole) - 1):  # without the newline at the end
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            with pytest.raises(CheckpointError, match=name):
                Manifest.read(path)


def test_a_deeply_nested_manifest_is_only_damaged(tmp_path):
    (tmp_path / "manifest.json").write_bytes(b"[" * 100_000)
    with pytest.raises(CheckpointError, match=r"manifest.json: damaged"):
        Manifest.read(tmp_path / "manifest.json")


# Saving is all or nothing


class Killed(BaseException):
    """Nothing in the package catches it: the process is as good as gone."""


class Saboteur:
    """Counts the calls that change the disk; the n-th fails: before it did anything, or half-way."""

    CALLS = (
        (os, "replace"),
        (os, "link"),
        (os, "fsync"),
        (shutil, "copyfile"),
        (shutil, "rmtree"),
        (Path, "mkdir"),
        (Path, "unlink"),
        (Path, "write_text"),
        (checkpoint, "save_file"),
        (checkpoint, "save_torch_state_dict"),
    )

    def __init__(self, monkeypatch: pytest.MonkeyPatch, nth: int | None, moment: str, fault: type[BaseException]):
        self.calls, self.nth, self.moment, self.fault = 0, nth, moment, fault
        for owner, name in self.CALLS:
            monkeypatch.setattr(owner, name, self.wrap(name, getattr(owner, name)))

    def wrap(self, name: str, call: Callable) -> Callable:
        def sabotaged(*args, **options):
            self.calls += 1
            if self.calls != self.nth:
                return call(*args, **options)
            self.nth = None  # what fails calls nothing else that fails
            if self.moment == "half":
                self.half(name, call, *args, **options)
            raise self.fault(28, "No space left on device")

        return sabotaged

    def half(self, name: str, call: Callable, *args, **options) -> None:
        if name == "rmtree":
            path = next(iter(files_of(Path(args[0]))), None)
            if path is not None:
                os.remove(path)
        elif name == "write_text":
            call(args[0], args[1][: len(args[1]) // 2])
        elif name in ("save_file", "save_torch_state_dict"):
            call(*args, **options)
            path = Path(args[1]) if name == "save_file" else Path(args[1]) / "model.safetensors"
            os.truncate(path, path.stat().st_size // 2)
        elif name == "copyfile":
            Path(args[1]).write_bytes(Path(args[0]).read_bytes()[:100])


def interrupted_saves(save, before: Path, tmp_path: Path, model: LanguageModel, moment: str, fault, keep: int):
    """The run folder after a save of step 2 that failed at its n-th change of the disk, for every n."""
    total, nth = None, 0
    while total is None or nth <= total:
        run = tmp_path / f"run-{nth}"
        shutil.copytree(before, run)
        with pytest.MonkeyPatch.context() as patch:
            saboteur = Saboteur(patch, nth or None, moment, fault)  # the first only counts
            try:
                save(run, 2, model, keep)
                failed = False
            except (fault, RunError):
                failed = True
        total = saboteur.calls if total is None else total
        yield nth, failed, run
        nth += 1
        shutil.rmtree(run)
    assert total > 40


@pytest.mark.parametrize("moment", ["before", "half"])
@pytest.mark.parametrize(("fault", "keep"), [(OSError, 2), (Killed, 1)])
def test_a_save_that_fails_anywhere_leaves_every_earlier_checkpoint_and_a_run_that_loads(
    save, tmp_path, moment, fault, keep
):
    old, new, newer = (make_model(seed) for seed in range(3))
    save(tmp_path / "before", 1, old)
    for nth, _, run in interrupted_saves(save, tmp_path / "before", tmp_path, new, moment, fault, keep):
        whole = [folder.name for folder, damage in intact_checkpoints(run) if damage is None]
        assert "00000001" in whole or keep == 1, nth
        assert whole, nth
        for name in whole:
            assert same(load(run / "checkpoints" / name), {"00000001": old, "00000002": new}[name]), nth
        shown = load(run)
        assert same(shown, old) or ("00000002" in whole and same(shown, new)), nth
        save(run, 3, newer, keep)
        assert same(load(run), newer), nth
        assert not [path for path in run.rglob(".*.tmp") if path.parent == run / "checkpoints"], nth


@pytest.mark.parametrize("moment", ["before", "half"])
def test_a_first_save_that_fails_anywhere_is_absent_or_loads(save, tmp_path, moment):
    model = make_model(0)
    (tmp_path / "before").mkdir()
    loaded = 0
    for nth, _, run in interrupted_saves(save, tmp_path / "before", tmp_path, model, moment, Killed, 2):
        if any(damage is None for _, damage in intact_checkpoints(run)):
            assert same(load(run), model), nth
            loaded += 1
        else:
            with pytest.raises(CheckpointError):
                load(run)
    assert loaded > 5


def test_a_file_system_without_hard_links_gets_copies(save, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    model = make_model(0)
    save(tmp_path, 1, model)
    assert (tmp_path / "model.safetensors").stat().st_nlink == 1
    assert same(load(tmp_path), model)


def test_links_of_which_half_were_replaced_still_show_the_last_whole_state(save, tmp_path):
    old, new = make_model(0), make_model(1)
    save(tmp_path, 1, old)
    index = (tmp_path / "index.json").read_bytes()
    written = save(tmp_path, 2, new)
    (tmp_path / "index.json").write_bytes(index)  # killed before the index
    (tmp_path / "config.json").unlink()
    shutil.copy(tmp_path / "checkpoints" / "00000001" / "config.json", tmp_path)
    assert same(load(tmp_path), old)
    checkpoint.publish(tmp_path, written, None)
    assert same(load(tmp_path), new)


# Pruning


def test_prune_keeps_the_newest_and_the_best(save, tmp_path):
    for step in range(1, 7):
        save(tmp_path, step, make_model(step), keep=10)
    folders = checkpoint.list_checkpoints(tmp_path)
    (tmp_path / "checkpoints" / ".00000009.tmp" / "training").mkdir(parents=True)
    checkpoint.prune(tmp_path, 2, folders[-1], folders[1])
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["00000002", "00000005", "00000006"]


def test_prune_never_deletes_the_checkpoint_resumed_from_in_favour_of_damaged_newer_ones(save, tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, make_model(step), keep=10)
    folders = checkpoint.list_checkpoints(tmp_path)
    for damaged in folders[2:]:
        (damaged / "model.safetensors").write_bytes(b"")
    checkpoint.prune(tmp_path, 1, folders[1], None)
    intact = [folder.name for folder, damage in intact_checkpoints(tmp_path) if damage is None]
    assert intact == ["00000002"]


# Resuming past damage


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def figures(run: Path) -> list[dict]:
    return [
        {name: value for name, value in record.items() if name not in CLOCK_FIELDS}
        for record in read_records(run / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory) -> Path:
    run = tiny_run(store, budget=BudgetConfig(steps=8), checkpoint=CheckpointConfig(every=2, keep=4))
    folder = tmp_path_factory.mktemp("trained") / "run"
    fit(run, folder)
    return folder


@pytest.mark.parametrize("keep", [1, 4])
@pytest.mark.parametrize(
    "file", ["model.safetensors", "manifest.json", "training/optimizer.safetensors", "training/state.json"]
)
def test_resuming_passes_over_damaged_checkpoints_says_so_and_ends_with_the_same_bits(
    store, trained, tmp_path, file, keep
):
    run = tiny_run(store, budget=BudgetConfig(steps=8), checkpoint=CheckpointConfig(every=2, keep=keep))
    folder = unlinked_copy(trained, tmp_path / "run")
    for step in (6, 8):
        path = folder / "checkpoints" / f"{step:08d}" / file
        path.write_bytes(path.read_bytes()[:-10])
    display = Notes()
    assert fit(run, folder, resume=True, display=display).finished
    told = "\n".join(display.notes)
    for step in (6, 8):
        assert f"passed over: {folder}/checkpoints/{step:08d}/{file}: damaged" in told
    assert f"resuming {folder} from step 4" in told
    assert (folder / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    assert figures(folder) == figures(trained)


@pytest.mark.parametrize("file", ["model.safetensors", "manifest.json"])
def test_a_damaged_best_checkpoint_does_not_keep_the_newest_from_being_resumed(store, trained, tmp_path, file):
    run = tiny_run(store, budget=BudgetConfig(steps=8), checkpoint=CheckpointConfig(every=2, keep=4))
    folder = unlinked_copy(trained, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "00000008")
    path = folder / "checkpoints" / "00000004" / file  # of the only validation so far, hence the best
    path.write_bytes(path.read_bytes()[:-10])
    assert fit(run, folder, resume=True).finished
    assert (folder / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    assert figures(folder) == figures(trained)


def test_resuming_with_no_intact_checkpoint_is_refused_and_deletes_nothing(store, trained, tmp_path):
    run = tiny_run(store, budget=BudgetConfig(steps=8), checkpoint=CheckpointConfig(every=2, keep=4))
    folder = unlinked_copy(trained, tmp_path / "run")
    for path in folder.glob("checkpoints/*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-10])
    before = {path: path.read_bytes() for path in files_of(folder)}
    with pytest.raises(CheckpointError, match="none of its checkpoints is intact"):
        fit(run, folder, resume=True)
    assert {path: path.read_bytes() for path in files_of(folder)} == before


def test_a_checkpoint_that_another_program_wrote_wrongly_is_refused_in_one_line(store, trained, tmp_path):
    """Hashes agree, yet the counters are not what `save` writes."""
    run = tiny_run(store, budget=BudgetConfig(steps=8), checkpoint=CheckpointConfig(every=2, keep=4))
    folder = unlinked_copy(trained, tmp_path / "run")
    newest = folder / "checkpoints" / "00000008"
    manifest = Manifest.read(newest / "manifest.json")
    state = newest / "training" / "state.json"
    whole = json.loads(state.read_text())
    for change in ({"progress": {"step": "many"}}, {"progress": None}, {"optimizer_steps": 3}):
        state.write_text(json.dumps(whole | change))
        files = {**manifest.files, "training/state.json": checkpoint.hash_file(state)}
        manifest.model_copy(update={"files": files}).write(newest / "manifest.json")
        with pytest.raises(CheckpointError, match="training: damaged") as error:
            fit(run, folder, resume=True)
        assert "\n" not in str(error.value)
