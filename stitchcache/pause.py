"""No garbage collection in the middle of a warm start. Imports nothing heavy."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """Keep the cyclic collector from running for the length of the block.

    A warm start makes thousands of objects that go again at once, and its imports thousands that stay. They
    count towards the next full collection all the same, and with torch imported that one takes
    longer than the whole start. What must be collected is collected after the block.

    The switch is the process's. A thread that finds it off leaves it off; so threads in such blocks at one
    time only shorten the pause.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        # The young generation only: what is left of the block dies here, instead of growing old and
        # bringing a full collection nearer.
        gc.collect(0)
        gc.enable()
