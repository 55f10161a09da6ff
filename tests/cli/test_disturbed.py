"""The command while the world is against it: a full disk, signals, a second run in its folder, a read-only folder.

Whatever happened, `--resume` ends with the bits of a run that was left alone.
"""

import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from calling import Result
from forking import Forked, Server
from myriad import checkpoint, cli
from myriad.train.record import CLOCK_FIELDS, read_records
from tiny import tiny_model

STEPS = 24


@pytest.fixture(scope="module")
def config(store, tmp_path_factory) -> Path:
    settings = {
        "model": tiny_model(layers=1, d_model=16).model_dump(mode="json"),
        "data": {"path": str(store.path)},
        "optim": {"lr": 0.01, "warmup": 5},
        "budget": {"steps": STEPS},
        "batch": {"tokens": 128},
        "train": {"precision": "float32"},
        "evaluation": {"every": 8, "tokens": 256},
        "checkpoint": {"every": 4},
    }
    path = tmp_path_factory.mktemp("disturbed") / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def undisturbed(server, config, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    result = server.run("train", config, f"out={run}", "--quiet")
    assert result.code == 0, result.err
    return run


@pytest.fixture(scope="module")
def begun(server, config, tmp_path_factory) -> Path:
    """A run that was stopped on its way."""
    run = tmp_path_factory.mktemp("begun") / "run"
    process = server.start("train", config, f"out={run}", "--quiet")
    wait_for_step(run, 10)
    process.send(signal.SIGTERM)
    assert "to continue: " in process.wait().out
    assert 10 <= last_step(run) < STEPS
    return run


def figures(run: Path) -> list[dict]:
    return [
        {name: value for name, value in record.items() if name not in CLOCK_FIELDS}
        for record in read_records(run / "metrics.jsonl")
    ]


def last_step(run: Path) -> int:
    return max((record["step"] for record in read_records(run / "metrics.jsonl")), default=0)


def wait_for_step(run: Path, step: int) -> None:
    until = time.monotonic() + 120
    while last_step(run) < step:
        assert time.monotonic() < until
        time.sleep(0.002)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_one_line(result: Result, *parts: str, code: int) -> None:
    assert result.code == code, result
    assert len(result.err.splitlines()) == 1, result.err
    assert result.err.startswith("myriad: ")
    assert result.out == ""
    for part in parts:
        assert part in result.err


def assert_goes_on(server: Server, config: Path, run: Path, undisturbed: Path) -> None:
    """`--resume` ends with the bits of a run that was left alone."""
    result = server.run("train", config, f"out={run}", "--resume", "--quiet")
    assert result.code == 0, result.err
    assert figures(run) == figures(undisturbed)
    for name in ("model.safetensors", "training/optimizer.safetensors"):
        mine, theirs = (checkpoint.list_checkpoints(folder)[-1] / name for folder in (run, undisturbed))
        assert mine.read_bytes() == theirs.read_bytes()
    assert (run / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    assert not [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]


# A full disk


def test_files_that_cannot_grow_end_the_run_in_a_line_and_it_goes_on_when_they_can(
    server, config, begun, undisturbed, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(begun, run)
    newest = checkpoint.list_checkpoints(begun)[-1]
    before = {folder.name: contents(folder) for folder in checkpoint.list_checkpoints(run)}
    sizes = {name: (newest / name).stat().st_size for name in ("model.safetensors", "training/optimizer.safetensors")}
    metrics = (begun / "metrics.jsonl").stat().st_size
    limits = {
        "index.json": 500,
        "metrics.jsonl": metrics + 200,
        **{name: size - 10 for name, size in sizes.items()},
    }
    sessions = (begun / "sessions.jsonl").stat().st_size
    assert 2 * sessions < metrics + 200 < min(sizes.values())  # the next session is noted first
    for name, largest in limits.items():
        result = server.run("train", run, "--resume", "--quiet", largest=largest)
        assert_one_line(result, str(run), "File too large", code=1)
        assert (f"{run / name}: " if "json" in name else f"{run}/checkpoints/.000000") in result.err, name
        assert {folder.name: contents(folder) for folder in checkpoint.list_checkpoints(run)} == before, name
        checkpoint.load(run)
    assert_goes_on(server, config, run, undisturbed)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full_ends_the_run_in_a_line_and_it_goes_on_when_there_is_room(
    server, config, begun, undisturbed, small_disk
):
    run, ballast = small_disk / "run", small_disk / "ballast"
    shutil.copytree(begun, run)
    kept = checkpoint.list_checkpoints(run)[-1].name
    whole = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize
    failed = 0
    for left in (0, 8192, 24_576, 65_536, 90_112, 131_072):
        ballast.write_bytes(bytes(max(0, whole - left)))
        result = server.run("train", run, "--resume", "--quiet")
        if result.code:
            assert_one_line(result, str(run), "No space left on device", code=1)
            failed += 1
        ballast.unlink()
        intact = [folder.name for folder, damage in checkpoint.intact_checkpoints(run) if damage is None]
        assert max(intact) >= kept, left
        checkpoint.load(run)
    assert failed >= 3
    assert_goes_on(server, config, run, undisturbed)


# Signals


def assert_ended_by(number: signal.Signals, result: Result) -> None:
    """With a line that says how to go on; or, where nothing was there to save, by the signal."""
    assert "Traceback" not in result.err, result.err
    if result.code == 0:
        assert "to continue: " in result.out or "finished after step" in result.out
    elif number == signal.SIGINT:
        assert_one_line(result, "myriad: interrupted", code=130)
    else:
        assert result.code == -signal.SIGTERM


def disturb(server: Server, config: Path, run: Path, signals: int, seed: int) -> None:
    """Send signals at random moments of the start, the steps, the saves and the validations."""
    dice = random.Random(seed)
    for _ in range(signals):
        process = server.start("train", config, f"out={run}", "--resume", "--quiet")
        if dice.random() < 0.7:  # beyond the start
            before, more = last_step(run), dice.choice([1, 1, 2, 4])
            while last_step(run) < min(before + more, STEPS):
                time.sleep(0.002)
        time.sleep(dice.uniform(0.0, 0.1))
        number = dice.choice([signal.SIGINT, signal.SIGTERM])
        process.send(number)
        assert_ended_by(number, process.wait())


def test_signals_at_random_moments_then_resume_give_the_bits_of_a_run_left_alone(server, config, undisturbed, tmp_path):
    disturb(server, config, tmp_path / "run", signals=8, seed=0)
    assert_goes_on(server, config, tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 7))
def test_many_signals_at_random_moments_then_resume_give_the_bits_of_a_run_left_alone(
    server, config, undisturbed, tmp_path, seed
):
    disturb(server, config, tmp_path / "run", signals=25, seed=seed)
    assert_goes_on(server, config, tmp_path / "run", undisturbed)


def interrupt_while_loading(config: Path, run: Path, delay: float) -> Result:
    """Send Ctrl-C some seconds after a fresh process has begun to load the command."""
    command = [sys.executable, "-m", "myriad", "train", str(config), f"out={run}", "--resume", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)
    maps = Path(f"/proc/{process.pid}/maps")
    while "pydantic_core" not in maps.read_text():
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    # Python ends itself by the signal where the interrupt passed through `exec`; a shell says 130 to both.
    return Result(130 if process.returncode == -signal.SIGINT else process.returncode, out, err)


def assert_ends_interrupted(capsys: pytest.CaptureFixture[str]) -> None:
    """The command line, in this process, ends in the line of an interrupt."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "myriad: interrupted\n"


@pytest.mark.parametrize("swallowed", [True, False])
def test_ctrl_c_that_a_library_made_an_error_of_its_own_of_ends_the_command_in_a_line(monkeypatch, capsys, swallowed):
    def call_back() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as interrupt:
            raise ValueError("a number of an odd shape") from (None if swallowed else interrupt)

    monkeypatch.setattr("myriad.cli.app.app", call_back)
    assert_ends_interrupted(capsys)


@pytest.mark.parametrize("moment", ["__enter__", "__exit__"])
def test_ctrl_c_a_moment_before_or_after_it_is_looked_after_ends_the_command_in_a_line(monkeypatch, capsys, moment):
    def interrupted(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("myriad.cli.app.app", lambda: None)
    monkeypatch.setattr(cli._Interrupts, moment, interrupted)
    assert_ends_interrupted(capsys)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc here to see what is loaded")
@pytest.mark.parametrize(
    "delay", [0.0, 0.4, *(pytest.param(delay / 5, marks=pytest.mark.slow) for delay in range(1, 15))]
)
def test_ctrl_c_while_the_command_loads_ends_it_in_a_line(config, tmp_path, delay):
    result = interrupt_while_loading(config, tmp_path / "run", delay)
    if result.code == 0:  # it had begun to train
        assert "to continue: " in result.out or "finished after step" in result.out
    else:
        assert_one_line(result, "myriad: interrupted", code=130)


# Two runs in one folder


def test_a_second_run_in_a_folder_is_refused_and_the_first_ends_undisturbed(server, config, undisturbed, tmp_path):
    run = tmp_path / "run"
    first = server.start("train", config, f"out={run}", "--quiet")
    wait_for_step(run, 1)
    first.send(signal.SIGSTOP)
    try:
        assert_one_line(server.run("train", config, f"out={run}"), "already holds a run; --resume", code=2)
        for target in (config, run):
            second = server.run("train", target, f"out={run}", "--resume")
            assert_one_line(second, f"{run}: another process is training in this folder", code=2)
    finally:
        first.send(signal.SIGCONT)
    assert first.wait().code == 0
    assert figures(run) == figures(undisturbed)
    assert (run / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()


def test_a_run_that_was_killed_leaves_its_folder_free(server, config, undisturbed, tmp_path):
    run = tmp_path / "run"
    first = server.start("train", config, f"out={run}", "--quiet")
    wait_for_step(run, 1)
    first.send(signal.SIGKILL)
    assert first.wait().code == -signal.SIGKILL
    assert (run / ".lock").exists()
    assert_goes_on(server, config, run, undisturbed)


def test_two_runs_that_start_at_once_in_an_empty_folder_are_one(server, config, undisturbed, tmp_path):
    run = tmp_path / "run"
    processes = [server.start("train", config, f"out={run}", "--resume", "--quiet") for _ in range(3)]
    results = [process.wait() for process in processes]
    assert sorted(result.code for result in results)[0] == 0
    for result in results:
        if result.code:
            assert_one_line(result, "another process is training in this folder", code=2)
    assert figures(run) == figures(undisturbed)


# A read-only folder


@pytest.fixture
def sealed(tmp_path) -> Iterator[Path]:
    """A folder to be made read-only with `seal`; writable again at the end."""
    folder = tmp_path / "sealed"
    folder.mkdir()
    yield folder
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(0o700)


def seal(folder: Path) -> None:
    """Take the right to write from everything, from the leaves up."""
    for path in [*sorted(folder.rglob("*"), reverse=True), folder]:
        path.chmod(stat.S_IMODE(path.stat().st_mode) & 0o555)


def test_a_new_run_in_a_read_only_folder_is_refused_in_a_line(server, config, sealed):
    seal(sealed)
    result = server.run("train", config, f"out={sealed / 'run'}", "--quiet", plain=True)
    assert_one_line(result, str(sealed), "Permission denied", code=1)
    result = server.run("train", config, f"out={sealed}", "--quiet", plain=True)
    assert_one_line(result, str(sealed), "Permission denied", code=1)
    assert list(sealed.iterdir()) == []


@pytest.mark.parametrize("locked", [True, False])
def test_resuming_a_read_only_run_is_refused_in_a_line_and_changes_nothing(server, begun, sealed, locked):
    run = sealed / "run"
    shutil.copytree(begun, run)
    if not locked:
        (run / ".lock").unlink()
    before = contents(run)
    seal(sealed)
    result = server.run("train", run, "--resume", "--quiet", plain=True)
    assert_one_line(result, str(run), "Permission denied", code=1)
    assert contents(run) == before


def test_a_read_only_run_is_evaluated_and_sampled_from_as_any_other(server, begun, sealed):
    run = sealed / "run"
    shutil.copytree(begun, run)
    expected = [server.run("eval", begun), server.run("generate", begun, "--temperature", 0, "--max-tokens", 5)]
    before = contents(run)
    seal(sealed)
    found = [
        server.run("eval", run, plain=True),
        server.run("generate", run, "--temperature", 0, "--max-tokens", 5, plain=True),
    ]
    assert [result.code for result in found] == [0, 0], found
    assert [result.out for result in found] == [result.out for result in expected]
    assert contents(run) == before


def test_an_evaluation_that_cannot_write_its_file_says_so_in_a_line(server, begun, sealed):
    seal(sealed)
    result = server.run("eval", begun, "--json", sealed / "figures.json", plain=True)
    assert result.code == 1
    assert result.err == f"myriad: {sealed / 'figures.json'}: Permission denied\n"


def test_a_process_without_roots_rights_obeys_the_modes_of_files(server, sealed):
    """Else the tests above would prove nothing."""
    seal(sealed)
    (sealed.parent / "config.yaml").write_text("a: 1")
    (sealed.parent / "config.yaml").chmod(0o000)
    result = server.run("config", "show", sealed.parent / "config.yaml", plain=True)
    assert_one_line(result, "cannot be read", "Permission denied", code=2)
    assert isinstance(server.start("presets"), Forked)
