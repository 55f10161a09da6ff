"""One display for all runs of a comparison: how far the whole is, and how the runs in the making go."""

from collections.abc import Sequence
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from myriad.analysis.compare.conduct import Outcome
from myriad.analysis.compare.plan import Trial
from myriad.train.record import Display, Numbers, Record


class TerminalBoard:
    """Live bars on a terminal, of all runs and of each in the making; elsewhere a line when one begins and ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._whole = self._bars.add_task("preparing", total=None, numbers="")
        self._free: list[TaskID] = []
        self._bar: dict[str, TaskID] = {}
        """Of each run in the making."""
        self._tokens: dict[str, int] = {}
        """Of each run, so far."""
        self._runs = self._begun = 0

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def expect(self, trials: Sequence[Trial]) -> None:
        self._runs = len(trials)
        self._bars.update(self._whole, description="all runs", total=sum(trial.tokens for trial in trials))

    def begin(self, trial: Trial | None) -> Display:
        if trial is None:
            return _View(self, "", 0)
        self._begun += 1
        if not self._console.is_terminal:
            self.note(f"{trial.name}: run {self._begun} of {self._runs}, {trial.tokens:,} tokens")
        bar = self._free.pop() if self._free else self._bars.add_task("", total=None, numbers="")
        self._bars.reset(bar, description=trial.name, total=None, numbers="")
        self._bar[trial.name] = bar
        return _View(self, trial.name, trial.run.batch.tokens)

    def training(self, name: str, step: int, tokens: int, numbers: str) -> None:
        """A run in the making is after a step, and so many tokens."""
        self._bars.update(self._bar[name], completed=step, numbers=numbers)
        self._count(name, tokens)

    def started(self, name: str, steps: int) -> None:
        """A run in the making has so many steps."""
        self._bars.update(self._bar[name], total=steps)

    def measuring(self, trial: Trial, tokens: int, total: int) -> None:
        title, bar = f"{trial.name}, held-out text", self._bar[trial.name]
        if next(task for task in self._bars.tasks if task.id == bar).description != title:
            self._bars.reset(bar, description=title, total=total, numbers="")
        self._bars.update(bar, advance=tokens)

    def end(self, trial: Trial, outcome: Outcome, new: bool) -> None:
        if trial.name in self._bar:
            self._free.append(self._bar.pop(trial.name))
        else:  # it did not begin here
            self._begun += 1
        self._count(trial.name, trial.tokens)
        self.note(f"{trial.name}: {_describe(outcome)}{'' if new else ' (finished before)'}")

    def note(self, text: str) -> None:
        self._console.print(text, markup=False)

    def _count(self, name: str, tokens: int) -> None:
        """A run has so many tokens by now."""
        self._tokens[name] = tokens
        self._bars.update(self._whole, completed=sum(self._tokens.values()), numbers=f"run {self._begun}/{self._runs}")


def _describe(outcome: Outcome) -> str:
    if outcome.diverged is not None:
        return f"diverged ({outcome.diverged})"
    if outcome.held_out is None:
        return f"validation loss {outcome.best_validation_loss:.4f}" if outcome.best_validation_loss else "no figures"
    return f"{outcome.held_out.perplexity.bits_per_byte:.4f} bits per byte of held-out text"


class _View:
    """The display of one run, on the board of all."""

    def __init__(self, board: TerminalBoard, name: str, tokens_per_step: int) -> None:
        self._board, self._name, self._tokens_per_step = board, name, tokens_per_step
        self._numbers = Numbers()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, step: int, steps: int) -> None:
        self._board.started(self._name, steps)
        self._board.training(self._name, step, step * self._tokens_per_step, "")

    def show(self, record: Record) -> None:
        self._numbers.take(record)
        self._board.training(self._name, record["step"], record["tokens"], str(self._numbers))

    def note(self, text: str) -> None:
        self._board.note(text)
