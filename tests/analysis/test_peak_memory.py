import pytest
import torch

from myriad.analysis.bench.memory import tells_peak
from myriad.analysis.peak_memory import PeakMemory, recorded_peak

SIZE = 300 * 2**20

pytestmark = pytest.mark.skipif(not tells_peak(torch.device("cpu")), reason="the system does not tell the peak")


def session(folder, held: int, records=("train", "validation")) -> None:
    memory = PeakMemory(folder, {}, "", 0)
    for kind in records:
        block = torch.ones(held // 4)  # written, so that its pages are there
        memory.log({"kind": kind})
        del block
    memory.close()


def test_the_peak_of_a_run_is_that_of_its_largest_session(tmp_path):
    assert recorded_peak(tmp_path) is None
    session(tmp_path, 1024)
    small = recorded_peak(tmp_path)
    session(tmp_path, SIZE)
    large = recorded_peak(tmp_path)
    assert large - small > 0.9 * SIZE
    session(tmp_path, 1024)  # what came before does not count for it, and is not forgotten
    assert recorded_peak(tmp_path) == large


def test_a_session_that_trains_nothing_says_nothing(tmp_path):
    session(tmp_path, 1024, records=())
    assert recorded_peak(tmp_path) is None


def test_a_damaged_record_is_none(tmp_path):
    (tmp_path / "memory.json").write_text("{")
    assert recorded_peak(tmp_path) is None
