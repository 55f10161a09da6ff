"""`myriad bench`: a PEER layer and whole models, measured beside PEER-pytorch and beside what the machine allows.

Contenders take turns in one process on the same weights and inputs; every figure is a median with its quartiles.

- `run.py` puts it together; `settings.py` says what is measured, `report.py` what comes out
- `layer.py`, `step.py`, `peak.py` and `model.py` measure; `case.py`, `timing.py` and `memory.py` are what they share
- `peer_pytorch.py`: the other implementation, with our weights
- `rates.py` and `bounds.py`: the machine's bandwidth and arithmetic, and the least time that these allow
"""

from myriad.analysis.bench.report import Measurement, Report, Spread
from myriad.analysis.bench.run import run_bench
from myriad.analysis.bench.settings import BenchConfig, ModelShape

__all__ = ["BenchConfig", "Measurement", "ModelShape", "Report", "Spread", "run_bench"]
