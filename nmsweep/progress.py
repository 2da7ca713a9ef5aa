"""One display for a sweep: a live bar on a terminal, plain lines elsewhere."""

import sys
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

SPEED_PERIOD_S = 6 * 3600.0
"""Seconds of the past from which the time left is estimated; a cell of a large model takes an hour."""


class _Count(MofNCompleteColumn):
    """Steps done of all steps, where their number is known."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.total else Text("")


class Display:
    """Shows a user the progress of cells.

    Args:
        n_cells: cells that will run; raised if more appear.
        stream: where it is shown; stderr by default.
        quiet: show nothing, in a process that shares its terminal with another.
    """

    def __init__(self, n_cells: int = 0, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self._console = Console(file=stream or sys.stderr, quiet=quiet)
        self._live = self._console.is_terminal and not quiet
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), _Count(), TimeElapsedColumn(), TimeRemainingColumn(),
            console=self._console, transient=True, disable=not self._live, speed_estimate_period=SPEED_PERIOD_S,
        )  # fmt: skip
        self._n_cells = n_cells
        self._n_done = 0
        self._shown: set[str] = set()
        self._cells = self._bar.add_task("cells", total=n_cells)
        self._stage = self._bar.add_task("", total=None, visible=False)
        self._cell = ""

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def expect(self, n_cells: int) -> None:
        """Set the number of cells that will run."""
        self._n_cells = n_cells
        self._bar.update(self._cells, total=n_cells)

    def cell(self, name: str) -> None:
        """Show that a cell begins."""
        self._cell = name
        self.say(f"{self._count(name)} {name}")

    def _count(self, name: str) -> str:
        """Return the number of a cell among all, in the order they are shown."""
        self._shown.add(name)
        if len(self._shown) > self._n_cells:
            self.expect(len(self._shown))
        return f"[{len(self._shown)}/{self._n_cells}]"

    def stage(self, name: str, n_steps: int | None = None) -> None:
        """Show that a stage of the current cell begins, of `n_steps` tasks or blocks; None if unknown."""
        self._bar.reset(self._stage, total=n_steps, visible=True, description=f"  {escape(self._cell)}: {name}")

    def step(self) -> None:
        """Count one step of the current stage."""
        self._bar.advance(self._stage)

    def finished(self, outcome: str) -> None:
        """Show that the current cell has ended."""
        self._advance()
        self._bar.update(self._stage, visible=False)
        self.say(f"    {outcome}")

    def elsewhere(self, name: str, outcome: str) -> None:
        """Show that a cell has ended in another process; one that began here says so itself."""
        if name not in self._shown:
            self.say(f"{self._count(name)} {name}: {outcome}")
            self._advance()

    def _advance(self) -> None:
        self._n_done += 1
        self._bar.update(self._cells, completed=self._n_done)

    def say(self, text: str) -> None:
        """Print one line."""
        if self._live:
            self._console.print(escape(text), highlight=False, soft_wrap=True)
        elif not self._console.quiet:
            self._console.file.write(f"{text}\n")  # in one call, as two threads may print
            self._console.file.flush()
