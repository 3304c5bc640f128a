"""Fill the caches on disk that compiling reads, in a process of its own, while a model is captured.

Nothing depends on its outcome: what it did not do in time, or could not do, the pieces do themselves,
waiting for each other at torch's own file locks.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from stitchcache.pieces import children, get_backend

log = logging.getLogger("stitchcache")


@contextmanager
def warming(
    name: str, devices: Collection[str], options: Mapping[str, Any], before: int, needless: bool = False
) -> Iterator[None]:
    """Warm a backend up beside a block of code; what is not done at its end is given up.

    Args:
        name: The backend.
        devices: Device types in use.
        options: Backend options.
        before: Pieces that the backend has compiled on the store until now.
        needless: Nothing will be compiled: only run the block.
    """
    backend = get_backend(name)
    if needless or not children.available() or not backend.wants_warming():
        yield
        return
    directory, child = _begin(name, partial(backend.warm, tuple(devices), dict(options), before))
    try:
        yield
    finally:
        if child is not None:
            children.end(child)
        if directory is not None:
            _tell(Path(directory) / "log")
            shutil.rmtree(directory, ignore_errors=True)


def _begin(name: str, warm: Callable[[], None]) -> tuple[str | None, children.Child | None]:
    """Start the child; a machine that has no room for one, or for its log, does without."""
    directory = None
    try:
        directory = tempfile.mkdtemp(prefix="stitchcache-warming-")
        job = children.Job(name="warming", run=warm, log=Path(directory) / "log", backend=name)
        return directory, children.start(job)
    except OSError as error:
        log.debug("warming up: %s", error)
        return directory, None


def _tell(said: Path) -> None:
    if said.exists() and (text := said.read_text(errors="replace").strip()):
        log.debug("warming up: %s", text.splitlines()[-1])
