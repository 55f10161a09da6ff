"""Trained runs side by side: what each cost, what it reached, and which was better on held-out text.

`runs` reads single runs and sets two of them against each other. `plan` says what a comparison at equal compute trains,
`conduct` trains it, `standings` sums it up over seeds, `tables` writes it down, `page` is its report.
"""

from myriad.analysis.compare.runs import Contender, Course, Curve, Result, load_contender, load_curve, summary, verdict

__all__ = ["Contender", "Course", "Curve", "Result", "load_contender", "load_curve", "summary", "verdict"]
