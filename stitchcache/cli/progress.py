"""How far compilations have come: live lines on a terminal, plain ones elsewhere. All on stderr."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING

import click

from stitchcache.cli.output import left_text, printable, seconds_text

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Display:
    """Shows one line a target; a terminal's lines are redrawn in place by rich.

    Args:
        live: Whether lines are redrawn; ``None`` asks whether stderr is a terminal.
    """

    def __init__(self, live: bool | None = None) -> None:
        self._live = _rich_progress() if (sys.stderr.isatty() if live is None else live) else None
        self._tasks: dict[str, TaskID] = {}
        self._last = ""

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, name: str, stage: str, done: int = 0, total: int = 0, left: float | None = None) -> None:
        """Say where a target is, and how many seconds it will still take if anybody knows."""
        about = [left_text(left)] if left is not None else []
        if self._live is not None:
            count = ", ".join([f"{done}/{total} pieces", *about]) if total else ""
            self._live.update(self._task(name), stage=stage, count=count, completed=done, total=total or None)
            return
        line = f"{name}: {stage}" + (f" {done}/{total}" if total else "")
        # A log has one line for each change of stage or count, whatever the estimate says meanwhile.
        if line != self._last:
            click.echo(printable(", ".join([line, *about])), err=True)
            self._last = line

    def finish(self, name: str, status: str, seconds: float) -> None:
        """Say what became of a target; its clock stops."""
        if self._live is None:
            click.echo(printable(f"{name}: {status} in {seconds_text(seconds)}"), err=True)
            return
        task = self._task(name)
        self._live.update(task, stage=status, count="", completed=1, total=1)
        self._live.stop_task(task)

    def _task(self, name: str) -> TaskID:
        if name not in self._tasks and self._live is not None:
            self._tasks[name] = self._live.add_task(printable(name), total=None, stage="", count="")
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
