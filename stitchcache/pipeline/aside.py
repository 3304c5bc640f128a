"""Work in a child process beside a server, which is served first.

The child is a fork, as those that compile pieces are: it has the model without a second start-up, a crash
stays inside it, and what it allocates is not the server's.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import signal
import stat
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

from stitchcache.errors import CaptureError, OptionError, StitchCacheError
from stitchcache.pieces import children
from stitchcache.pipeline.find import OnProgress, Progress, Request

log = logging.getLogger("stitchcache")

T = TypeVar("T")

# Seconds after which the log says that the server leaves the child too little.
_LONG = 600.0


class Aside:
    """Work in a child process, and a step in this one that ends it; both are watched by a thread.

    Args:
        owner: Whom it is for. When nobody has the owner any more, the child ends.
        label: What to call it in the log.
        work: Runs in the child; what it returns survives pickling.
        take: Gets that in this process, in the thread. Neither it nor anything else here keeps the owner.
        backend: The backend's name, for errors.
        nice: Priority of the child, as of the command ``nice``; ``None`` gives it idle cores only.
        refused: Why nothing is to be compiled at all.

    Raises:
        OptionError: No child process can be forked here.
    """

    def __init__(
        self,
        owner: object,
        label: str,
        work: Callable[[OnProgress], T],
        take: Callable[[T], None],
        *,
        backend: str,
        nice: int | None = None,
        refused: str = "",
    ) -> None:
        if not children.available():
            raise OptionError(
                "on_miss='eager' compiles in a forked child, and none can be forked here: CUDA is in use, "
                "this is a daemonic process of multiprocessing, or the system is not Linux. Prewarm the "
                "model, or use on_miss='compile'.",
                option="on_miss",
            )
        self._status, self._label, self._backend = "eager", label, backend
        self._nice = children.IDLE if nice is None else nice
        self._process, self._dropped = os.getpid(), False
        self._child: children.Child | None = None
        self._begun, self._ended = threading.Event(), threading.Event()
        self._mutex = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []
        if refused:
            self._end(f"failed: {refused}")
            return
        # A thread forks the child, as the kernel ends a child when the thread that forked it ends.
        thread = threading.Thread(target=self._run, args=([work], take), name="stitchcache aside")
        thread.daemon = True
        try:
            thread.start()
        except RuntimeError as error:
            # No room for a thread.
            self._end(f"failed: {error}")
            return
        # The caller holds no lock while it waits here, which a child would inherit for ever.
        self._begun.wait()
        weakref.finalize(owner, self._drop).atexit = False

    @property
    def here(self) -> bool:
        """Whether this is the process that has the thread; one that is forked from it has none."""
        return os.getpid() == self._process

    @property
    def status(self) -> str:
        """As :attr:`CompiledModel.status`."""
        if self.here or self._status.startswith(("compiled", "failed")):
            return self._status
        return "failed: this process was forked while another one compiled: call stitchcache.compile() here"

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it is done, at most so many seconds; whether it was done well."""
        if self.here:
            self._ended.wait(seconds)
        return self._status == "compiled"

    def on_ready(self, callback: Callable[[], None]) -> None:
        """Call something when it is done well, at once where it is."""
        # A process may have been forked while the mutex was held.
        with self._mutex if self.here else nullcontext():
            if self._status != "compiled":
                self._callbacks.append(callback)
                return
        callback()

    def _run(self, work: list[Callable[[OnProgress], T]], take: Callable[[T], None]) -> None:
        # Stands where something raises that nobody thought of; the thread's traceback is printed then.
        status = "failed: it ended in an error, see the traceback"
        try:
            take(self._in_child(work))
            status = "compiled"
        except (StitchCacheError, OSError) as error:
            # Or there is no room for a process, or for its log.
            status = f"failed: {error}"
        finally:
            self._begun.set()
            self._end(status)

    def _end(self, status: str) -> None:
        if status != "compiled" and not self._dropped:
            # Before whoever waits goes on.
            log.warning("%s: the model goes on running as it is: %s", self._label, status)
        with self._mutex:
            self._status, callbacks, self._callbacks = status, self._callbacks, []
        # Before callbacks, which may wait themselves.
        self._ended.set()
        for callback in callbacks if status == "compiled" else ():
            try:
                callback()
            except Exception:
                # Users' code: one that fails must not keep the others from being called.
                log.exception("%s: a callback of on_ready failed", self._label)

    def _in_child(self, work: list[Callable[[OnProgress], T]]) -> T:
        receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)

        def run() -> T:
            receiver.close()
            _leave_sockets()
            return work[0](sender.send)

        with tempfile.TemporaryDirectory(prefix="stitchcache-aside-") as directory:
            job = children.Job(
                name=self._label,
                run=run,
                log=Path(directory) / "log",
                backend=self._backend,
                nice=self._nice,
            )
            with sender:
                child = self._child = children.start(job)
            # The child has the model now. Here it goes with its owner.
            work.clear()
            self._begun.set()
            # multiprocessing waits for children at exit. Whoever wants that calls wait().
            atexit.register(self._end_child, child)
            try:
                self._watch(child, receiver)
                result: T = children.finish(child, _died)
                return result
            finally:
                atexit.unregister(self._end_child)
                children.end(child)
                receiver.close()

    def _end_child(self, child: children.Child) -> None:
        # A process that is forked from this one inherits this call, and not the child.
        if self.here:
            self._dropped = True
            children.end(child)

    def _drop(self) -> None:
        # The collector may call this anywhere, so the rest is the thread's.
        self._dropped = True
        if self.here and self._child is not None and self._child.process.is_alive():
            children.signal_group(self._child, signal.SIGTERM)

    def _watch(self, child: children.Child, receiver: Any) -> None:
        """Follow what the child tells until it is done or dead."""
        sources: set[Any] = {child.process.sentinel, child.connection, receiver}
        patience: float | None = _LONG
        while True:
            ready = wait(sources, patience)
            if not ready:
                patience = None
                said = "%s: %s after %d s. If no core is ever idle, options={'stitchcache.nice': 10} helps"
                log.warning(said, self._label, self._status, _LONG)
            elif receiver in ready:
                try:
                    told: Progress = receiver.recv()
                    if told.stage == "compile":
                        self._status = f"compiling {min(told.done + 1, told.total)} of {told.total}"
                except EOFError:
                    sources.discard(receiver)
            else:
                return


def _died(job: children.Job, code: int, lines: Sequence[str]) -> CaptureError:
    how = f"was killed by {children.signal_name(code)}" if code < 0 else f"ended with status {code}"
    said = lines[-1] if lines else "it said nothing"
    return CaptureError(
        f"the process that compiled {job.name} {how}: {said[:300]}. Pieces that it finished are stored, and "
        "the next start goes on from there.",
        reason=said,
    )


def with_few_jobs(request: Request) -> Request:
    """A request that compiles on a quarter of the cores, unless it says itself how many processes do."""
    few = {"stitchcache.jobs": max(1, len(os.sched_getaffinity(0)) // 4)}
    return replace(request, options={**few, **request.options})


def _leave_sockets() -> None:
    """Let go of the server's connections: a client would not see the end of one while this process lives."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                # Not closed: whoever holds the number would close what gets it next.
                os.dup2(nothing, int(name), inheritable=False)
    os.close(nothing)
