"""The picture beside a run: what it holds, and when it is drawn."""

import json
import math

import pytest
from run_folders import train_record, validation_record

from myriad.analysis import curve
from myriad.analysis.curve import LearningCurve


@pytest.fixture
def drawings(monkeypatch):
    """What was drawn: the curve's numbers, without matplotlib."""
    drawn = []

    def draw(curve, validation_loss, path):
        drawn.append((list(curve.train_loss), list(validation_loss), list(curve.validation_bits)))
        path.write_bytes(b"picture")

    monkeypatch.setattr(curve, "learning_curve", draw)
    return drawn


def follow(folder, from_step=0, **options):
    return LearningCurve(folder, {}, "", from_step, **options)


def test_a_run_leaves_a_picture(tmp_path):
    tracker = follow(tmp_path)
    tracker.log(train_record(1, 3.0))
    tracker.log(validation_record(1, 2.5, 3.6))
    tracker.close()
    assert (tmp_path / "learning-curve.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["learning-curve.png"]


def test_it_is_drawn_at_validations_seldom_and_at_the_end(tmp_path, drawings):
    tracker = follow(tmp_path, pause=1000)
    tracker.log(train_record(1, 3.0))
    assert not drawings
    tracker.log(validation_record(1, 2.5, 3.6))
    tracker.log(train_record(2, math.nan))
    tracker.log(validation_record(2, 2.0, 2.9))
    assert drawings == [([3.0], [2.5], [3.6])]
    tracker.close()
    assert len(drawings) == 2
    assert drawings[1][1:] == ([2.5, 2.0], [3.6, 2.9])


def test_slow_drawings_pause_longer(tmp_path, drawings, monkeypatch):
    times = iter([0.0, 0.0, 5.0, 400.0, 506.0, 506.0, 511.0])
    monkeypatch.setattr(curve.time, "monotonic", lambda: next(times))
    tracker = follow(tmp_path)
    for step in range(1, 4):  # drawn from 0 s to 5 s; at 400 s it is too early, at 506 s drawn
        tracker.log(validation_record(step, 2.0, 2.9))
    assert len(drawings) == 2


def test_nothing_new_is_not_drawn(tmp_path, drawings):
    follow(tmp_path).close()
    tracker = follow(tmp_path)
    tracker.log(validation_record(1, 2.5, 3.6))
    tracker.close()
    assert len(drawings) == 1


def test_a_resumed_run_begins_with_what_was_recorded(tmp_path, drawings):
    before = [train_record(1, 3.0), validation_record(1, 2.5, 3.6), train_record(2, None), train_record(3, 9.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in before))
    tracker = follow(tmp_path, from_step=1)
    tracker.log(train_record(2, 2.0))
    tracker.close()
    assert drawings == [([3.0, 2.0], [2.5], [3.6])]
