"""How far compilations have come: live lines on a terminal, plain ones elsewhere. All on stderr."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import click

from stitchcache.cli.words import left_text, printable, seconds_text

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Display(Protocol):
    """Shows one line a target."""

    def __enter__(self) -> Display: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def update(self, name: str, stage: str, done: int = 0, total: int = 0, left: float | None = None) -> None:
        """Say where a target is, and how many seconds it will still take if anybody knows."""

    def finish(self, name: str, status: str, seconds: float) -> None:
        """Say what became of a target."""


def display() -> Display:
    """A display that fits stderr."""
    return LiveDisplay() if sys.stderr.isatty() else PlainDisplay()


class PlainDisplay:
    """One line for each change of stage or count."""

    def __init__(self) -> None:
        self._last = ""

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def update(self, name: str, stage: str, done: int = 0, total: int = 0, left: float | None = None) -> None:
        """Print where a target is, unless that was said already."""
        count = f" {done}/{total}" if total else ""
        line = f"{name}: {stage}{count}"
        about = f", {left_text(left)}" if left is not None else ""
        if line != self._last:
            click.echo(printable(line + about), err=True)
            self._last = line

    def finish(self, name: str, status: str, seconds: float) -> None:
        """Print what became of a target."""
        click.echo(printable(f"{name}: {status} in {seconds_text(seconds)}"), err=True)


class LiveDisplay:
    """A line a target, redrawn in place by rich."""

    def __init__(self) -> None:
        self._progress = _rich_progress()
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> LiveDisplay:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, name: str, stage: str, done: int = 0, total: int = 0, left: float | None = None) -> None:
        """Redraw a target's line."""
        about = [left_text(left)] if left is not None else []
        count = ", ".join([f"{done}/{total} pieces", *about]) if total else ""
        self._progress.update(
            self._task(name), stage=stage, count=count, completed=done, total=total if total else None
        )

    def finish(self, name: str, status: str, seconds: float) -> None:
        """Redraw a target's line for the last time, its clock stopped."""
        task = self._task(name)
        self._progress.update(task, stage=status, count="", completed=1, total=1)
        self._progress.stop_task(task)

    def _task(self, name: str) -> TaskID:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(printable(name), total=None, stage="", count="")
        return self._tasks[name]


def _rich_progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    # Names are foreign text: no markup in any column.
    return Progress(
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[stage]}", markup=False),
        TextColumn("{task.fields[count]}", markup=False),
        TimeElapsedColumn(),
        console=Console(stderr=True, highlight=False),
    )
