"""Every file of a run, cut short or with a bit flipped: what reads it gives the right figures or refuses.

Exempt are `.lock`, which is empty and holds nothing, and `learning-curve.png`, which no program reads and a resumed
run draws anew.
"""

import math
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from myriad import checkpoint
from myriad.analysis.compare import load_contender, load_curve
from myriad.analysis.curve import LearningCurve
from myriad.analysis.measure import measure_run
from myriad.cli.train import resolve_run
from myriad.config import MyriadError
from myriad.evaluate import Perplexity
from myriad.hf.generation import generate_text
from myriad.train import fit, logs
from myriad.train.record import CLOCK_FIELDS, Record, Silent, read_records
from myriad.train.run import BudgetConfig, CheckpointConfig
from myriad.train.trackers import Opener
from tiny import tiny_model, tiny_run

EXEMPT = (".lock", "learning-curve.png")
PERPLEXITY = Perplexity(1.0, 100, 25, 100, 16, 8)
READERS: list[Callable[[Path], object]] = [
    measure_run,
    lambda run: generate_text(run, "the ", max_tokens=3, temperature=0.0),
    lambda run: load_curve(run, "x"),
    lambda run: load_contender(run, "x", PERPLEXITY, "validation").record(),
]


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class StopsAfter(Silent):
    def __init__(self, step: int) -> None:
        self.step = step

    def show(self, record: Record) -> None:
        if record["kind"] == "train" and record["step"] == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def resume(run: Path, trackers: Sequence[Opener] = (LearningCurve,)) -> list[str]:
    """`myriad train RUN --resume` to the end of its budget; what it noted."""
    display = Notes()
    assert fit(resolve_run(str(run), [])[0], run, resume=True, display=display, trackers=trackers).finished
    return display.notes


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory) -> Path:
    """A run of 10 steps that was stopped after 4 and after 8, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("damage") / "run"
    model, kept = tiny_model(layers=1, d_model=16), CheckpointConfig(every=4, keep=2)
    run = tiny_run(store, model=model, checkpoint=kept, budget=BudgetConfig(steps=10))
    for step in (4, 8):
        assert fit(run, folder, resume=True, display=StopsAfter(step), trackers=[LearningCurve]).step == step
    return folder


def copy_of(run: Path, to: Path) -> Path:
    """A copy that keeps hard links, so that damage in place strikes every name of a file, as it would on a disk."""
    copies: dict[int, Path] = {}
    for path in sorted(run.rglob("*")):
        target = to / path.relative_to(run)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        first = copies.setdefault(path.stat().st_ino, target)
        shutil.copyfile(path, target) if first == target else os.link(first, target)
    return to


def files_of(run: Path) -> list[str]:
    return sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())


def some(content: bytes, dice: random.Random, cuts: int, flips: int) -> Iterator[tuple[str, bytes]]:
    """Ways to damage a file: shorter, or with one bit flipped."""
    for size in dice.sample([0, len(content) // 2, len(content) - 2], cuts):  # a newline at the end is no loss
        yield f"cut to {size} bytes", content[:size]
    for _ in range(flips):
        position, bit = dice.randrange(len(content)), dice.randrange(8)
        flipped = bytearray(content)
        flipped[position] ^= 1 << bit
        yield f"bit {bit} of byte {position} flipped", bytes(flipped)


def figures(run: Path) -> list[dict]:
    return [
        {name: value for name, value in record.items() if name not in CLOCK_FIELDS}
        for record in read_records(run / "metrics.jsonl")
    ]


def refusal(action, *words) -> tuple[object, str]:
    """What an action returns, or the one line in which it refuses."""
    try:
        return action(*words), ""
    except MyriadError as error:
        line = str(error)
        assert line
        assert "\n" not in line
        return None, line


def test_every_file_is_in_this_test_or_exempt(trained):
    names = {Path(name).name for name in files_of(trained)}
    assert names == {
        *(".lock", "learning-curve.png", "metrics.jsonl", "sessions.jsonl", "index.json", "manifest.json"),
        *("run.json", "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"),
        *("optimizer.safetensors", "state.json"),
    }
    assert (trained / ".lock").stat().st_size == 0
    assert len(checkpoint.list_checkpoints(trained)) == 2


def check_readers(trained: Path, folder: Path, cuts: int, flips: int) -> None:
    """Evaluation, generation and the report's readers, on every damage of every file."""

    expected = [read(trained) for read in READERS]
    dice = random.Random(0)
    run = copy_of(trained, folder / "run")
    for name in files_of(run):
        if name in EXEMPT:
            continue
        path = run / name
        whole, noticed = path.read_bytes(), 0
        for how, broken in some(whole, dice, cuts, flips):
            path.write_bytes(broken)
            for read, right in zip(READERS, expected, strict=True):
                found, line = refusal(read, run)
                assert line or found == right, (name, how)
                noticed += bool(line)
        path.write_bytes(whole)
        if name in ("index.json", "model.safetensors", "config.json", "run.json", *logs.LOGS):
            assert noticed, name


def test_reading_a_damaged_run_gives_the_right_figures_or_refuses_in_a_line(trained, tmp_path):
    check_readers(trained, tmp_path, cuts=1, flips=1)


@pytest.mark.slow
def test_reading_a_run_of_many_damages_gives_the_right_figures_or_refuses_in_a_line(trained, tmp_path):
    check_readers(trained, tmp_path, cuts=3, flips=25)


def check_resuming(trained: Path, folder: Path, cuts: int, flips: int) -> None:
    resume(copy_of(trained, folder / "whole"), trackers=())
    weights = (folder / "whole" / "model.safetensors").read_bytes()
    expected = figures(folder / "whole")
    dice = random.Random(1)
    for name in files_of(trained):
        if name in EXEMPT:
            continue
        for how, broken in some((trained / name).read_bytes(), dice, cuts, flips):
            run = copy_of(trained, folder / "run")
            (run / name).write_bytes(broken)
            notes, line = refusal(resume, run, ())  # drawing takes longer than the steps
            assert not line, (name, how, line)
            assert (run / "model.safetensors").read_bytes() == weights, (name, how)
            if name == "metrics.jsonl":
                assert any(f"{run / name}: damaged" in note for note in notes), how
                assert refusal(load_curve, run, "x")[1].startswith(f"{run / name}: damaged"), how
            else:
                assert figures(run) == expected, (name, how)
            if name == "sessions.jsonl":
                assert any(f"{run / name}: damaged" in note for note in notes), how
            if name.startswith("checkpoints/00000008"):
                assert any("passed over: " in note and "00000008" in note for note in notes), (name, how)
            checkpoint.verify(run, checkpoint.Manifest.read(run / checkpoint.INDEX))
            shutil.rmtree(run)


def test_resuming_a_damaged_run_ends_with_the_bits_of_an_intact_one_and_says_what_it_passed_over(trained, tmp_path):
    check_resuming(trained, tmp_path, cuts=1, flips=0)


@pytest.mark.slow
def test_resuming_a_run_of_many_damages_ends_with_the_bits_of_an_intact_one(trained, tmp_path):
    check_resuming(trained, tmp_path, cuts=2, flips=2)


# Logs


@pytest.mark.parametrize("name", logs.LOGS)
def test_every_flipped_bit_of_a_log_breaks_its_seal(trained, tmp_path, name):
    run = copy_of(trained, tmp_path / "run")
    newest = checkpoint.list_checkpoints(run)[-1]
    state = checkpoint.read_json(newest / "training" / "state.json")
    assert logs.broken_seals(run, state) == {}
    whole = (run / name).read_bytes()
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        (run / name).write_bytes(flipped)
        assert set(logs.broken_seals(run, state)) == {name}, position
    (run / name).unlink()
    assert set(logs.broken_seals(run, state)) == {name}


def test_what_is_appended_after_a_seal_leaves_it_intact(trained, tmp_path):
    run = copy_of(trained, tmp_path / "run")
    for name in logs.LOGS:
        with (run / name).open("a") as file:
            file.write('{"kind": "train", "st')
    assert load_curve(run, "x") == load_curve(trained, "x")
    assert not [note for note in resume(run) if "damaged" in note]
    assert not refusal(load_curve, run, "x")[1]


def test_a_damaged_log_stays_known_over_later_checkpoints(trained, tmp_path):
    run = copy_of(trained, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[1:]))
    resume(run)
    assert [record["step"] for record in figures(run) if record["kind"] == "train"] == list(range(2, 11))
    with pytest.raises(MyriadError, match=r"metrics.jsonl: damaged \(not what was recorded up to step 10\)"):
        load_contender(run, "x", PERPLEXITY, "validation")


def test_a_torn_line_of_a_session_does_not_swallow_the_next_session(trained, tmp_path):
    run = copy_of(trained, tmp_path / "run")
    with (run / "sessions.jsonl").open("a") as file:
        file.write('{"time": "20')
    resume(run)
    assert len(load_contender(run, "x", PERPLEXITY, "validation").sessions) == 3


def test_records_with_odd_values_neither_stop_a_run_nor_its_picture(trained, tmp_path):
    run = copy_of(trained, tmp_path / "run")
    odd = [
        '{"kind": "train", "step": 1}',
        '{"kind": "train", "step": 1, "tokens": "many", "loss": 1}',
        '{"kind": "train", "step": 1, "tokens": -5, "loss": "low"}',
        '{"kind": "validation", "step": 1, "tokens": 5, "loss": NaN, "bits_per_byte": {"a": Infinity}}',
        '{"kind": 5, "step": 1, "tokens": 5}',
        '{"step": 1, "tokens": 1e400}',
        '{"kind": "train", "step": 1, "tokens": ' + "9" * 400 + ', "loss": ' + "9" * 400 + "}",
        "[" * 100_000,
        "null",
        "\u2028\x00",
    ]
    (run / "metrics.jsonl").write_text("\n".join(odd) + "\n")
    notes = resume(run)
    assert any("metrics.jsonl: damaged" in note for note in notes)
    assert [record["step"] for record in figures(run)][-1] == 10


def test_a_damaged_picture_is_drawn_anew(trained, tmp_path):
    run = copy_of(trained, tmp_path / "run")
    (run / "learning-curve.png").write_bytes(b"x")
    resume(run)
    assert (run / "learning-curve.png").read_bytes().startswith(b"\x89PNG")
    assert math.isfinite(measure_run(run).perplexity.loss)
