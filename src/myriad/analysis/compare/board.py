"""One display for all runs of a comparison: how far the whole is, and how the run in the making goes."""

from collections.abc import Sequence
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from myriad.analysis.compare.conduct import Outcome
from myriad.analysis.compare.plan import Trial
from myriad.train.record import Display, Numbers, Record


class TerminalBoard:
    """Two live bars on a terminal, of all runs and of one; elsewhere a line when a run begins and when it ends."""

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
        self._one = self._bars.add_task("", total=None, numbers="", visible=False)
        self._runs = self._ended = self._spent = 0

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
            return _View(self, 0)
        if not self._console.is_terminal:
            self.note(f"{trial.name}: run {self._ended + 1} of {self._runs}, {trial.tokens:,} tokens")
        self._bars.reset(self._one, description=trial.name, total=None, visible=True, numbers="")
        return _View(self, trial.run.batch.tokens)

    def training(self, step: int, tokens: int, numbers: str) -> None:
        """The run in the making is after a step, and so many tokens."""
        self._bars.update(self._one, completed=step, numbers=numbers)
        self._bars.update(self._whole, completed=self._spent + tokens, numbers=f"run {self._ended + 1}/{self._runs}")

    def started(self, steps: int) -> None:
        """The run in the making has so many steps."""
        self._bars.update(self._one, total=steps)

    def measuring(self, trial: Trial, tokens: int, total: int) -> None:
        title = f"{trial.name}, held-out text"
        if self._bars.tasks[self._one].description != title:
            self._bars.reset(self._one, description=title, total=total, numbers="")
        self._bars.update(self._one, advance=tokens)

    def end(self, trial: Trial, outcome: Outcome, new: bool) -> None:
        self._ended += 1
        self._spent += trial.tokens
        self._bars.update(self._whole, completed=self._spent, numbers=f"run {self._ended}/{self._runs}")
        self.note(f"{trial.name}: {_describe(outcome)}{'' if new else ' (finished before)'}")

    def note(self, text: str) -> None:
        self._console.print(text, markup=False)


def _describe(outcome: Outcome) -> str:
    if outcome.diverged is not None:
        return f"diverged ({outcome.diverged})"
    if outcome.held_out is None:
        return f"validation loss {outcome.best_validation_loss:.4f}" if outcome.best_validation_loss else "no figures"
    return f"{outcome.held_out.perplexity.bits_per_byte:.4f} bits per byte of held-out text"


class _View:
    """The display of one run, on the board of all."""

    def __init__(self, board: TerminalBoard, tokens_per_step: int) -> None:
        self._board, self._tokens_per_step = board, tokens_per_step
        self._numbers = Numbers()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, step: int, steps: int) -> None:
        self._board.started(steps)
        self._board.training(step, step * self._tokens_per_step, "")

    def show(self, record: Record) -> None:
        self._numbers.take(record)
        self._board.training(record["step"], record["tokens"], str(self._numbers))

    def note(self, text: str) -> None:
        self._board.note(text)
