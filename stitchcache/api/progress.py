"""How far compilations have come, on stderr: live on a terminal or in a notebook, else a line a step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from stitchcache.errors import printable

if TYPE_CHECKING:
    from stitchcache.pipeline.find import OnProgress, Progress


@contextmanager
def bar() -> Iterator[OnProgress]:
    """What ``on_progress="bar"`` tells, for the length of a block. A direct hit shows nothing."""
    last = ""
    with ExitStack() as shown:
        live: Callable[[str, int, int], None] | None = None

        def told(now: Progress) -> None:
            nonlocal last, live
            if now.stage == "lookup":
                return
            count = f" {now.done}/{now.total}" if now.total else ""
            line = printable(f"{now.target}: {now.stage}{count}")
            about = "" if now.left is None else f", {left_text(now.left)}"
            # What is on stderr can be written over; in a notebook rich needs ipywidgets for that.
            notebook = "ipykernel" in sys.modules and find_spec("ipywidgets") is not None
            if (notebook or sys.stderr.isatty()) and (live is not None or now.stage != "done"):
                live = live or _live_bar(shown)
                live(line + about, now.done, now.total)
            # A log has one line for each change of stage or count, whatever the estimate says meanwhile.
            elif line != last and now.stage != "done":
                print(line + about, file=sys.stderr, flush=True)
                last = line

        yield told


def _live_bar(shown: ExitStack) -> Callable[[str, int, int], None]:
    # Not at the top: a log is written without it, and a direct hit needs neither.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(20), TimeElapsedColumn(), TextColumn("{task.description}"))
    bar = shown.enter_context(Progress(*columns, console=Console(stderr=True, highlight=False)))
    task = bar.add_task("", total=None)

    def show(line: str, done: int, total: int) -> None:
        bar.update(
            task, description=line.replace("[", r"\["), completed=done, total=total or None, refresh=True
        )

    return show


def left_text(seconds: float) -> str:
    """An estimate, no finer than it is: ``about 20 s left``, ``about 3 min left``."""
    if seconds < 60:
        return f"about {max(1, round(seconds / 5) * 5 if seconds > 10 else round(seconds))} s left"
    return f"about {round(seconds / 60)} min left"
