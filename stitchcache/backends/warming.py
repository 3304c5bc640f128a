"""Fill the caches on disk that compiling reads, in a process of its own, while a model is captured.

Nothing depends on its outcome: what it did not do in time, or could not do, the pieces do themselves,
waiting for each other at torch's own file locks.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from stitchcache.backends import children, get_backend

log = logging.getLogger("stitchcache")


@contextmanager
def warming(
    name: str, devices: Collection[str], options: Mapping[str, Any], needless: bool = False
) -> Iterator[None]:
    """Warm a backend up beside a block of code; what is not done at its end is given up.

    Args:
        name: The backend.
        devices: Device types in use.
        options: Backend options.
        needless: Nothing will be compiled: only run the block.
    """
    backend = get_backend(name)
    if needless or not children.available() or not backend.wants_warming():
        yield
        return
    with tempfile.TemporaryDirectory(prefix="stitchcache-warming-") as directory:
        said = Path(directory) / "log"
        job = children.Job(
            name="warming", run=partial(backend.warm, tuple(devices), dict(options)), log=said, backend=name
        )
        child = children.start(job)
        try:
            yield
        finally:
            children.end(child)
            _tell(said)


def _tell(said: Path) -> None:
    if said.exists() and (text := said.read_text(errors="replace").strip()):
        log.debug("warming up: %s", text.splitlines()[-1])
