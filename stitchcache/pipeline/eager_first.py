"""Eager first: the model serves as it is while a child process compiles it; then the artifact takes over.

The child is a fork, as those that compile pieces are: it has the model without a second start-up, a crash
stays inside it, and what it allocates is not the server's. Only the direct lookup runs in this process, and
at the end the loading of what the child stored.
"""

from __future__ import annotations

import atexit
import logging
import mmap
import os
import signal
import stat
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

import torch

from stitchcache import collection_paused
from stitchcache.cache import Cache
from stitchcache.errors import CaptureError, OptionError, StaleEntryError, StitchCacheError, check_kind
from stitchcache.explanation import differences_text, explain_differences
from stitchcache.pieces import children
from stitchcache.pipeline import start
from stitchcache.pipeline.find import Miss, OnProgress, Progress, Request, Wanted, find, want
from stitchcache.runtime import as_it_is
from stitchcache.runtime.model import CompiledModel
from stitchcache.types import Artifact, Check

log = logging.getLogger("stitchcache")

T = TypeVar("T")

# Seconds after which the log says that the server leaves the child too little.
_LONG = 600.0
# Seconds that the thread, and users' callbacks in it, have to end when the process exits.
_AT_EXIT = 10.0


class Aside:
    """Work in a child process, and a step in this one that ends it; both are watched by a thread.

    When nobody has the ``owner`` any more, the child ends: neither ``take`` nor anything else here keeps it.
    ``work`` runs in the child, and what it returns survives pickling; ``take`` gets that in this process, in
    the thread. ``refused`` is why nothing is to be compiled at all.
    """

    def __init__(
        self,
        owner: object,
        label: str,
        request: Request,
        work: Callable[[OnProgress], T],
        take: Callable[[T], None],
        refused: str = "",
    ) -> None:
        if not children.available():
            raise OptionError(
                "on_miss='eager' compiles in a forked child, and none can be forked here: CUDA is in use, "
                "this is a daemonic process of multiprocessing, or the system is not Linux. Prewarm the "
                "model, or use on_miss='compile'.",
                option="on_miss",
            )
        self._status, self._label, self._request = "eager", label, request
        self._process, self._dropped = os.getpid(), False
        self._child: children.Child | None = None
        self._begun, self._ended = threading.Event(), threading.Event()
        self._callbacks: deque[Callable[[], None]] = deque()
        # The piece that the child is at, counted from 1, and how many there are: memory that both share.
        self._piece = memoryview(mmap.mmap(-1, 8)).cast("i")
        if refused:
            self._end(f"failed: {refused}")
            return
        # A thread forks the child, as the kernel ends a child when the thread that forked it ends.
        self._thread = threading.Thread(target=self._run, args=([work], take), name="stitchcache aside")
        self._thread.daemon = True
        # multiprocessing waits for children at exit. Whoever wants that calls wait().
        atexit.register(self._leave)
        try:
            self._thread.start()
        except RuntimeError as error:
            # No room for a thread.
            self._end(f"failed: {error}")
            atexit.unregister(self._leave)
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
        if self.here and self._status == "eager":
            number, count = self._piece
            return f"compiling {number} of {count}" if number else "eager"
        if self.here or self._status != "eager":
            return self._status
        return "failed: this process was forked while another one compiled: call stitchcache.compile() here"

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it is done, at most so many seconds; whether it was done well."""
        if self.here:
            self._ended.wait(seconds)
        return self._status == "compiled"

    def on_ready(self, callback: Callable[[], None]) -> None:
        """Call something when it is done well, at once where it is."""
        self._callbacks.append(callback)
        self._call_back()

    def _call_back(self) -> None:
        # No lock, which a process may be forked with: a callback is taken by one thread, and then called.
        with suppress(IndexError):
            while self._status == "compiled":
                callback = self._callbacks.popleft()
                try:
                    callback()
                except Exception:
                    # Users' code: one that fails must not keep the others from being called.
                    log.exception("%s: a callback of on_ready failed", self._label)

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
            atexit.unregister(self._leave)

    def _end(self, status: str) -> None:
        if status != "compiled" and not self._dropped:
            # Before whoever waits goes on.
            log.warning("%s: the model goes on running as it is: %s", self._label, status)
        self._status = status
        # Before callbacks, which may wait themselves.
        self._ended.set()
        self._call_back()

    def _in_child(self, work: list[Callable[[OnProgress], T]]) -> T:
        def run() -> T:
            _leave_sockets()
            return work[0](self._note)

        with tempfile.TemporaryDirectory(prefix="stitchcache-aside-") as directory:
            job = children.Job(
                name=self._label,
                run=run,
                log=Path(directory) / "log",
                backend=self._request.backend,
                nice=children.IDLE if self._request.nice is None else self._request.nice,
            )
            child = self._child = children.start(job)
            # The child has the model now. Here it goes with its owner.
            work.clear()
            self._begun.set()
            try:
                ended = (child.process.sentinel, child.connection)
                if not wait(ended, _LONG):
                    said = "If no core is ever idle, options={'stitchcache.nice': 10} helps"
                    log.warning("%s: %s after %d s. %s", self._label, self.status, _LONG, said)
                    wait(ended)
                result: T = children.finish(child, _died)
                return result
            finally:
                children.end(child)

    def _note(self, now: Progress) -> None:
        """In the child: say how far it is."""
        if now.stage == "compile":
            self._piece[1], self._piece[0] = now.total, min(now.done + 1, now.total)

    def _leave(self) -> None:
        """End the child and the thread with the process."""
        # A process that is forked from this one inherits this call, and neither of them.
        if self.here:
            self._drop()
            # The interpreter stops threads wherever they are. Inside of torch that aborts the process.
            self._thread.join(_AT_EXIT)

    def _drop(self) -> None:
        # The collector may call this anywhere, so the rest is the thread's.
        self._dropped = True
        if self.here and self._child is not None and self._child.process.is_alive():
            children.signal_group(self._child, signal.SIGTERM)


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


class EagerFirst(CompiledModel):
    """A model that runs as it is until a child process has compiled it; from then on a compiled model.

    What belongs to an artifact (``artifact``, ``graph_hash``) is there once ``status`` is ``"compiled"``.
    """

    __slots__ = ()

    def __init__(self, wanted: Wanted, miss: Miss) -> None:
        self.check = Check(state="pending")
        self.cache_hit, self.timings, self.changed, self.mismatches = None, {}, None, {}
        self._eager = None
        self.lookup, self._target = (wanted.site.label, wanted.target, miss), wanted.target
        self._device, self._swapped = wanted.site.device, threading.Lock()
        self._serve(wanted.model)
        request = replace(with_few_jobs(wanted.request), on_miss="compile")
        if request.checked == "background":
            # Nobody waits for the child, and a thread of it would end with it.
            request = replace(request, check="example")

        def work(tell: OnProgress) -> tuple[str, str, str]:
            # In the child: importing what captures and compiles takes a second; no server needs it.
            from stitchcache.pipeline.trace import compile_traced

            site = replace(wanted.site, on_progress=tell, ready=None, asks=True, timings={})
            made = compile_traced(replace(wanted, request=request, site=site), miss)
            return made.graph_hash, made.check.state, made.check.reason

        given, mine = (wanted.args, wanted.kwargs, request, wanted.site.cache), weakref.ref(self)

        def take(made: tuple[str, str, str]) -> None:
            if (served := mine()) is not None:
                served._take(made, given)

        refused = (
            "nothing could tell at the end whether the model is still what was compiled: "
            f"{miss.reason}. Mend that, or compile it before it serves (on_miss='compile')."
        )
        refused = refused if miss.cause == "unkeyable" else ""
        self._aside = Aside(self, wanted.site.label, request, work, take, refused)

    @property
    def status(self) -> str:
        """``"eager"``, ``"compiling 2 of 3"``, ``"compiled"``, or ``"failed: "`` and the reason."""
        return self._aside.status

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until the compiled model serves, or compiling has failed; whether it serves."""
        return self._aside.wait(seconds)

    def on_ready(self, callback: Callable[[CompiledModel], None]) -> None:
        """Call something in the thread that swaps the compiled model in, after that; at once if it serves.

        Not called after a failure. A callback that fails is logged.
        """
        check_kind("callback", callback, Callable, "a function of one argument")
        self._aside.on_ready(lambda: callback(self))

    def is_current(self) -> bool:
        """As :meth:`CompiledModel.is_current`; what runs is the model itself, as long as it does."""
        return True if self._artifact is None else super().is_current()

    def rebind(self, model: torch.nn.Module, *, trust_model: bool = False) -> CompiledModel:
        """As :meth:`CompiledModel.rebind`. While nothing is compiled, another model simply runs instead."""
        check_kind("model", model, torch.nn.Module, "a torch.nn.Module")
        with self._unswapped():
            if self._artifact is not None:
                return super().rebind(model, trust_model=trust_model)
            self._serve(model)
        return self

    def leave_misfits(self, device: str, noted: Callable[[str], None]) -> None:
        """As :meth:`CompiledModel.leave_misfits`, from the swap on."""
        with self._unswapped():
            if self._artifact is not None:
                super().leave_misfits(device, noted)
            else:
                self._eager = (device, noted)

    def __repr__(self) -> str:
        if self._artifact is not None:
            return super().__repr__()
        return f"<CompiledModel {type(self.model).__name__} {self.status}>"

    @property
    def _artifact(self) -> Artifact | None:
        return vars(self).get("artifact")

    def __getattr__(self, name: str) -> Any:
        if name in ("artifact", "graph_hash"):
            said = f"there is no {name} while the model runs as it is (status: {self.status}): call wait()"
            raise AttributeError(said)
        return super().__getattr__(name)

    def _unswapped(self) -> AbstractContextManager[Any]:
        """A block that no swap interrupts. A forked process has none, and may have the lock as held."""
        return self._swapped if self._aside.here else nullcontext()

    def _serve(self, model: torch.nn.Module) -> None:
        self._stand_for(model, as_it_is(model, self._device))

    def _take(
        self, made: tuple[str, Any, str], given: tuple[tuple[Any, ...], Mapping[str, Any], Request, Cache]
    ) -> None:
        """Load what the child stored. Calls go there from then on; one under way ends where it began.

        ``made`` has the graph hash, and how the child's look at it ended; ``given`` is for ``want``.
        """
        graph_hash, looked, why = made
        with self._swapped, collection_paused():
            before, wanted = self._target.factors, want(self.model, *given)
            # The child looked at this very model; that it is still the same one, its key and sources tell.
            found = find(wanted)
            if isinstance(found, Miss):
                differences = explain_differences(before, wanted.target.factors)
                reason = f"{found.reason}: it could not be stored, or was removed"
                if differences:
                    reason = f"the model has changed: {differences_text(differences)}"
                raise StaleEntryError(
                    f"entry {graph_hash[:12]} was compiled, and is not used: {reason}. Compile it again.",
                    expected=graph_hash,
                    differences=differences,
                )
            served = start(replace(found, way="aside"), wanted.model, wanted.site, target=wanted.target)
            check = Check(state=looked, reason=why)
            if served.graph_hash != graph_hash:
                # Another process has compiled it again meanwhile.
                check = Check(state="unchecked", reason="the child compared another entry")
            state = vars(served) | {"cache_hit": None, "check": check, "lookup": self.lookup}
            del state["_eager"], state["mismatches"]
            vars(self).update(state)
            self._bind(self.model)


def eager_graph(
    gm: torch.nn.Module,
    label: str,
    request: Request,
    device: str,
    work: Callable[[OnProgress], None],
    take: Callable[[], Callable[..., Any]],
) -> Callable[..., Any]:
    """One of Dynamo's graphs: itself until a child has done the ``work``, then what ``take`` gives."""
    served = [as_it_is(gm, device)]

    def call(*args: Any) -> Any:
        return served[0](*args)

    def swap(_: None) -> None:
        # Dynamo's guards stand for what the graph relies on: nothing about it can have changed.
        served[0] = take()

    Aside(call, label, request, work, swap)
    return call
