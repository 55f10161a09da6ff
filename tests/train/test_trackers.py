"""Trackers: what was logged is read back from their files, and a tracker that fails stops nothing."""

import json
import math
import shutil
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from myriad.config import ConfigError, RunError
from myriad.train.trackers import OPENERS, TensorBoard, Trackers, WeightsAndBiases, named, open_trackers, scalars

SETTINGS = {"model": {"kind": "transformer", "layers": 2, "pattern": ["dense"]}, "out": None, "seed": 7}


def train_record(step, loss):
    return {"kind": "train", "step": step, "tokens": 64 * step, "loss": loss, "lr": 0.01, "skipped": 0}


def validation_record(step, loss):
    return {"kind": "validation", "step": step, "tokens": 64 * step, "loss": loss, "best": True}


def follow(opener, folder, records, from_step=0):
    (tracker,) = open_trackers([opener], folder, SETTINGS, "0123abcd", from_step)
    for record in records:
        tracker.log(record)
    tracker.close()


class Listening:
    """A tracker that keeps what it is told, and may fail."""

    def __init__(self, fails_at=None, fails_to_close=False):
        self.records, self.closed = [], 0
        self.fails_at, self.fails_to_close = fails_at, fails_to_close

    def log(self, record):
        if record["step"] == self.fails_at:
            raise OSError("no space\nleft on the device")
        self.records.append(record["step"])

    def close(self):
        self.closed += 1
        if self.fails_to_close:
            raise RuntimeError


def test_every_finite_number_of_a_record_is_a_scalar():
    record = train_record(3, 2.5) | {"gradient_norm": math.inf, "aux_loss": None, "best": True, "note": "text"}
    assert scalars(record) == {"train/loss": 2.5, "train/lr": 0.01, "train/skipped": 0}


def test_a_tracker_that_fails_is_dropped_with_one_note():
    failing, sound = Listening(fails_at=2, fails_to_close=True), Listening()
    notes = []
    several = Trackers([failing, sound], notes.append)
    for step in range(1, 5):
        several.log(train_record(step, 1.0))
    several.close()
    assert (failing.records, sound.records) == ([1], [1, 2, 3, 4])
    assert (failing.closed, sound.closed) == (1, 1)
    assert notes == ["Listening failed and is dropped; training goes on (no space left on the device)"]


def test_all_are_closed_once_even_if_one_cannot_be():
    several = [Listening(), Listening(fails_to_close=True), Listening()]
    notes = []
    group = Trackers(several, notes.append)
    group.close()
    group.close()
    assert [tracker.closed for tracker in several] == [1, 1, 1]
    assert notes == ["Listening could not be finished (RuntimeError)"]


def test_trackers_have_names():
    assert named(["wandb", "tensorboard", "wandb"]) == [WeightsAndBiases, TensorBoard]


def test_an_unknown_name_is_one_line_with_the_nearest():
    with pytest.raises(ConfigError) as error:
        named(["tensorbord"])
    assert str(error.value) == "'tensorbord': no such tracker; did you mean 'tensorboard'? (known: tensorboard, wandb)"


@pytest.mark.parametrize("name", list(OPENERS))
def test_a_missing_library_is_one_line_that_says_how_to_get_it(name, tmp_path, monkeypatch):
    """A folder of the library's name, as wandb leaves in the working directory, is no library."""
    (tmp_path / name).mkdir()
    without = [place for place in sys.path if not place.endswith("-packages")]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *without])
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(ConfigError) as error:
        named([name])
    assert str(error.value) == f"{name}: not installed; pip install 'myriad-moe[{name}]'"


def test_failing_to_open_is_one_line_and_closes_what_was_open(tmp_path):
    opened = Listening()

    def needs_a_key(*_):
        raise ValueError("No API key.\nLog in.")

    with pytest.raises(RunError) as error:
        open_trackers([lambda *_: opened, needs_a_key], tmp_path, SETTINGS, "", 0)
    assert str(error.value) == "needs_a_key: cannot be opened (No API key. Log in.)"
    assert opened.closed == 1


def test_no_library_is_imported_unasked():
    check = (
        "import sys, myriad.train.trackers as t; t.named(['tensorboard', 'wandb']); "
        "assert not {'tensorboard', 'wandb', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)


class TestTensorBoard:
    def read(self, folder):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
        return events

    def curve(self, events, name):
        return [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)]

    def test_scalars_and_settings_are_in_the_event_files(self, tmp_path):
        follow(TensorBoard, tmp_path, [train_record(1, 3.5), train_record(2, math.nan), validation_record(2, 3.0)])
        events = self.read(tmp_path)
        assert events.Tags()["scalars"] == ["train/loss", "train/lr", "train/skipped", "validation/loss"]
        assert self.curve(events, "train/loss") == [(1, 3.5)]
        assert self.curve(events, "validation/loss") == [(2, 3.0)]
        (text,) = events.Tensors("settings/text_summary")
        shown = text.tensor_proto.string_val[0].decode()
        assert "# 0123abcd" in shown
        assert "seed: 7" in shown

    def test_settings_can_be_compared_between_runs(self, tmp_path):
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

        follow(TensorBoard, tmp_path, [])
        content = self.read(tmp_path).PluginTagToContent("hparams")["_hparams_/session_start_info"]
        values = HParamsPluginData.FromString(content).session_start_info.hparams
        assert values["model.layers"].number_value == 2
        assert values["model.pattern"].string_value == '["dense"]'
        assert values["out"].string_value == "null"

    def test_a_resumed_run_replaces_the_steps_after_its_checkpoint(self, tmp_path):
        follow(TensorBoard, tmp_path, [train_record(step, 1.0) for step in range(1, 7)])
        follow(TensorBoard, tmp_path, [train_record(step, 2.0) for step in range(4, 6)], from_step=3)
        assert self.curve(self.read(tmp_path), "train/loss") == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0)]

    def test_what_was_logged_is_on_the_disk_at_once(self, tmp_path):
        (tracker,) = open_trackers([TensorBoard], tmp_path, SETTINGS, "", 0)
        tracker.log(train_record(1, 3.5))
        assert self.curve(self.read(tmp_path), "train/loss") == [(1, 3.5)]
        tracker.close()

    def test_lost_files_do_not_stop_the_run(self, tmp_path, monkeypatch):
        writer_died = threading.Event()  # SummaryWriter writes in a thread of its own, which the loss kills
        monkeypatch.setattr(threading, "excepthook", lambda _: writer_died.set())
        notes = []
        several = Trackers(open_trackers([TensorBoard], tmp_path, SETTINGS, "", 0), notes.append)
        several.log(train_record(1, 3.5))
        shutil.rmtree(tmp_path / "tensorboard")
        for step in range(2, 6):
            several.log(train_record(step, 3.5))
        several.close()
        assert writer_died.wait(30)
        (note,) = notes
        assert note.startswith("TensorBoard failed and is dropped; training goes on (")
        assert "\n" not in note

    def test_a_place_that_cannot_be_written_is_one_line(self, tmp_path):
        (tmp_path / "tensorboard").write_text("in the way")
        with pytest.raises(RunError, match=r"^TensorBoard: cannot be opened \([^\n]+\)$"):
            open_trackers([TensorBoard], tmp_path, SETTINGS, "", 0)


class TestWeightsAndBiases:
    @pytest.fixture(autouse=True)
    def offline(self, tmp_path, monkeypatch):
        for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_RUN_ID"):
            monkeypatch.delenv(name, raising=False)
        for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
            monkeypatch.setenv(name, str(tmp_path / name))
        settings = {"MODE": "offline", "SILENT": "true", "ERROR_REPORTING": "false", "DISABLE_GIT": "true"}
        for name, value in settings.items():
            monkeypatch.setenv(f"WANDB_{name}", value)

    def test_the_logged_values_are_in_the_offline_files_of_one_run(self, tmp_path):
        run = tmp_path / "my-run"
        run.mkdir()
        follow(WeightsAndBiases, run, [train_record(1, 3.5), train_record(2, math.nan), train_record(3, 3.25)])
        follow(WeightsAndBiases, run, [train_record(2, 3.0), validation_record(2, 2.75)], from_step=1)
        paths = sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
        first, second = map(read_offline, paths)
        assert [row["train/loss"] for row in history(first) if "train/loss" in row] == [3.5, 3.25]
        assert [(row["step"], row["tokens"]) for row in history(first)] == [(1, 64), (2, 128), (3, 192)]
        assert [row.get("validation/loss") for row in history(second)] == [None, 2.75]
        for records in (first, second):
            started = next(record.run for record in records if record.HasField("run"))
            assert (started.project, started.display_name) == ("myriad", "my-run")
            assert started.run_id == (run / "wandb-id").read_text().strip()
            config = {item.key: item.value_json for item in started.config.update}
            assert (config["seed"], config["digest"]) == ("7", '"0123abcd"')
            (axis,) = [record.metric for record in records if record.HasField("metric") and record.metric.glob_name]
            assert (axis.glob_name, axis.step_metric) == ("*", "step")

    def test_its_users_variables_hold(self, tmp_path, monkeypatch):
        monkeypatch.setenv("WANDB_PROJECT", "mine")
        monkeypatch.setenv("WANDB_NAME", "first try")
        follow(WeightsAndBiases, tmp_path, [])
        (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
        started = next(record.run for record in read_offline(path) if record.HasField("run"))
        assert (started.project, started.display_name) == ("mine", "first try")

    def test_an_id_that_cannot_be_is_one_line(self, tmp_path):
        (tmp_path / "wandb-id").write_text("a/b")
        with pytest.raises(RunError, match=r"^WeightsAndBiases: cannot be opened \([^\n]+\)$"):
            open_trackers([WeightsAndBiases], tmp_path, SETTINGS, "", 0)


def read_offline(path: Path):
    """The records of a `.wandb` file, which another process writes, once the last is there."""
    until = time.monotonic() + 60
    while True:
        found = list(parse(path))
        if any(record.HasField("exit") for record in found):
            return found
        assert time.monotonic() < until, f"{len(found)} records, and no end"
        time.sleep(0.1)


def parse(path: Path):
    """The records of a `.wandb` file: a header, then LevelDB's log format, with a protocol buffer in each entry."""
    from wandb.proto.wandb_internal_pb2 import Record

    raw, place, header, block = path.read_bytes(), 7, 7, 32768
    assert raw.startswith(b":W&B") or not raw
    entry = b""
    while place + header <= len(raw):
        if block - place % block < header:
            place += block - place % block
            continue
        _, length, kind = struct.unpack_from("<IHB", raw, place)
        entry += raw[place + header : place + header + length]
        place += header + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(entry)
            entry = b""


def history(records):
    """The logged rows, as written."""
    for record in records:
        if record.HasField("history"):
            items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            yield {name: json.loads(value) for name, value in items.items() if not name.startswith("_")}
