"""Eager first: the model serves as it is while a child process compiles it; then the artifact takes over.

The child is a fork, as those that compile pieces are: it has the model without a second start-up, a crash
stays inside it, and what it allocates is not the server's. Only the direct lookup runs here, and at the end
the loading of what was stored.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

import torch

from stitchcache import collection_paused
from stitchcache.cache import Cache
from stitchcache.errors import CaptureError, OptionError, StaleEntryError, StitchCacheError, check_kind
from stitchcache.explanation import Explanation, differences_text, explain_differences
from stitchcache.pieces import children
from stitchcache.pipeline import start, started_or_miss
from stitchcache.pipeline.find import Miss, OnProgress, Progress, Request, Wanted, find, want
from stitchcache.runtime.eager import as_it_is
from stitchcache.runtime.model import CompiledModel
from stitchcache.types import Artifact, Check

log = logging.getLogger("stitchcache")

T = TypeVar("T")

# A call that is served beside the compilers takes nine tenths of the processor from them. At 19, the lowest
# priority, a server that is always busy would never be done.
_NICE = 10


class Aside:
    """Work in a child process, and a step in this one that ends it; both are watched by a thread.

    Args:
        label: What to call it in the log.
        work: Runs in the child; what it returns survives pickling.
        take: Gets that in this process, in the thread.
        backend: The backend's name, for errors.
        nice: Priority of the child, as of the command ``nice``.
        refused: Why nothing is to be compiled at all.
    """

    def __init__(
        self,
        label: str,
        work: Callable[[OnProgress], T],
        take: Callable[[T], None],
        *,
        backend: str,
        nice: int | None = None,
        refused: StitchCacheError | None = None,
    ) -> None:
        self.status = "eager"
        self.error: StitchCacheError | None = None
        self._label, self._backend, self._nice = label, backend, _NICE if nice is None else nice
        self._process = os.getpid()
        self._begun, self._ended = threading.Event(), threading.Event()
        self._mutex = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []
        if refused is not None:
            self._end(f"failed: {refused}", refused)
            return
        # A thread forks the child, as the kernel ends a child when the thread that forked it ends.
        threading.Thread(target=self._run, args=(work, take), name="stitchcache aside", daemon=True).start()
        # The caller holds no lock while it waits here, which a child would inherit for ever.
        self._begun.wait()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it is done, at most so many seconds; whether it was done well."""
        # A forked process has no such thread, and a callback of the thread may ask, too.
        if os.getpid() == self._process and self.status != "compiled":
            self._ended.wait(seconds)
        return self.status == "compiled"

    def on_ready(self, callback: Callable[[], None]) -> None:
        """Call something when it is done well, at once where it is."""
        with self._mutex:
            if self.status != "compiled":
                self._callbacks.append(callback)
                return
        callback()

    def _run(self, work: Callable[[OnProgress], T], take: Callable[[T], None]) -> None:
        # Stands where something raises that nobody thought of; the thread's traceback is printed then.
        status, failure = "failed: it ended in an error, see the traceback", None
        try:
            take(self._in_child(work))
            status = "compiled"
        except StitchCacheError as error:
            status, failure = f"failed: {error}", error
        except OSError as error:
            # No room for a process, or for its log.
            status = f"failed: no child process can compile: {error}"
        finally:
            self._begun.set()
            self._end(status, failure)

    def _end(self, status: str, error: StitchCacheError | None) -> None:
        if status != "compiled":
            # Before whoever waits goes on.
            log.warning("%s: the model goes on running as it is: %s", self._label, status)
        with self._mutex:
            self.status, self.error = status, error
        try:
            for callback in self._callbacks if status == "compiled" else ():
                callback()
        finally:
            self._ended.set()

    def _in_child(self, work: Callable[[OnProgress], Any]) -> Any:
        receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)

        def run() -> Any:
            receiver.close()
            os.setpriority(os.PRIO_PROCESS, 0, self._nice)
            return work(sender.send)

        with tempfile.TemporaryDirectory(prefix="stitchcache-aside-") as directory:
            job = children.Job(name=self._label, run=run, log=Path(directory) / "log", backend=self._backend)
            with sender:
                child = children.start(job)
            self._begun.set()
            # multiprocessing waits for children at exit. Whoever wants that calls wait().
            ending = partial(children.end, child)
            atexit.register(ending)
            try:
                self._watch(child, receiver)
                return self._result(child)
            finally:
                atexit.unregister(ending)
                children.end(child)
                receiver.close()

    def _watch(self, child: children.Child, receiver: Any) -> None:
        """Follow what the child tells until it is done or dead."""
        sources = {child.process.sentinel, child.connection, receiver}
        while True:
            ready = wait(sources)
            if receiver in ready:
                try:
                    self._note(receiver.recv())
                except EOFError:
                    sources.discard(receiver)
            elif ready:
                return

    def _note(self, progress: Progress) -> None:
        if progress.stage == "compile":
            self.status = f"compiling {min(progress.done + 1, progress.total)} of {progress.total}"

    def _result(self, child: children.Child) -> Any:
        answer = children.answer_of(child)
        if answer is None:
            lines, code = children.lines_of(child.job.log), child.process.exitcode or 0
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            said = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
            raise CaptureError(
                f"the process that compiled {self._label} {how}: {said[:300]}. Pieces that it finished are "
                "stored, and the next start goes on from there.",
                reason=said,
            )
        fine, result = answer
        if not fine:
            raise result
        return result


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
        request = replace(wanted.request, on_miss="compile")
        if request.checked == "background":
            # Nobody waits for the child, and a thread of it would end with it.
            request = replace(request, check="example")

        def work(tell: OnProgress) -> tuple[str, str, str]:
            # In the child: importing what captures and compiles takes a second; no server needs it.
            from stitchcache.pipeline.trace import compile_traced

            site = replace(wanted.site, on_progress=tell, ready=None, timings={})
            made = compile_traced(replace(wanted, request=request, site=site), miss)
            return made.graph_hash, made.check.state, made.check.reason

        given = (wanted.args, wanted.kwargs, request, wanted.site.cache)
        self._aside = Aside(
            wanted.site.label,
            work,
            lambda made: self._take(made, *given),
            backend=request.backend,
            nice=request.nice,
            refused=_unkeyable(miss),
        )

    @property
    def status(self) -> str:
        """``"eager"``, ``"compiling 2 of 3"``, ``"compiled"``, or ``"failed: "`` and the reason."""
        return self._aside.status

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until the compiled model serves, or until compiling has failed.

        Args:
            seconds: At most so long; ``None`` waits as long as it takes.

        Returns:
            Whether the compiled model serves.
        """
        return self._aside.wait(seconds)

    def on_ready(self, callback: Callable[[CompiledModel], None]) -> None:
        """Call something once the compiled model serves; at once if it does. Not called after a failure.

        Args:
            callback: Gets this object, in the thread that swapped the compiled model in.
        """
        check_kind("callback", callback, Callable, "a function of one argument")
        self._aside.on_ready(lambda: callback(self))

    def is_current(self) -> bool:
        """As :meth:`CompiledModel.is_current`; what runs is the model itself, as long as it does."""
        return True if self._artifact is None else super().is_current()

    def rebind(self, model: torch.nn.Module, *, trust_model: bool = False) -> CompiledModel:
        """As :meth:`CompiledModel.rebind`. While nothing is compiled, another model simply runs instead."""
        check_kind("model", model, torch.nn.Module, "a torch.nn.Module")
        with self._swapped:
            if self._artifact is not None:
                return super().rebind(model, trust_model=trust_model)
            self._serve(model)
        return self

    def leave_misfits(self, device: str, noted: Callable[[str], None]) -> None:
        """As :meth:`CompiledModel.leave_misfits`, from the swap on."""
        with self._swapped:
            if self._artifact is not None:
                super().leave_misfits(device, noted)
            else:
                self._eager = (device, noted)

    def explain(self) -> Explanation:
        """As :meth:`CompiledModel.explain`; before there is an artifact, what the lookup found out."""
        if self._artifact is not None:
            return super().explain()
        label, key, miss = self.lookup or ("", None, None)
        return Explanation(
            label=label,
            hit=None,
            reason="" if miss is None else miss.reason,
            target_key=None if key is None else key.key,
            graph_hash="",
            factors=() if key is None else key.factors,
            check=self.check,
            status=self.status,
        )

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

    def _serve(self, model: torch.nn.Module) -> None:
        self._stand_for(model, as_it_is(model, self._device))

    def _take(
        self,
        made: tuple[str, Any, str],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        request: Request,
        cache: Cache,
    ) -> None:
        """Load what the child stored. Calls go there from then on; one under way ends where it began.

        ``made`` has the graph hash, and how the child's look at it ended.
        """
        graph_hash, looked, why = made
        with self._swapped, collection_paused():
            before, wanted = self._target.factors, want(self.model, args, kwargs, request, cache)
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
            served = started_or_miss(
                found.artifact,
                wanted.site,
                lambda: start(replace(found, way="aside"), wanted.model, wanted.site, target=wanted.target),
            )
            if isinstance(served, Miss):
                raise StaleEntryError(f"entry {graph_hash[:12]} is not used: {served.reason}.")
            state = dict(vars(served))
            state["cache_hit"] = None
            state["check"] = Check(state=looked, reason=why)
            if served.graph_hash != graph_hash:
                # Another process has compiled it again meanwhile.
                state["check"] = Check(state="unchecked", reason="the child compared another entry")
            state["lookup"] = self.lookup
            del state["_eager"], state["mismatches"]
            vars(self).update(state)
            self._bind(self.model)


class EagerGraph:
    """One of Dynamo's graphs, which runs op by op until a child process has compiled it.

    Args:
        gm: The graph.
        label: What to call it in the log.
        request: Options.
        device: The device type that it runs on.
        work: Compiles and stores it, in the child.
        take: Loads it; what it returns is called from then on.
    """

    __slots__ = ("__call__", "__weakref__", "aside")

    def __init__(
        self,
        gm: torch.nn.Module,
        label: str,
        request: Request,
        device: str,
        work: Callable[[OnProgress], None],
        take: Callable[[], Callable[..., Any]],
    ) -> None:
        check_children()
        self.__call__ = as_it_is(gm, device)

        def swap(_: None) -> None:
            # Dynamo's guards stand for what the graph relies on: nothing about it can have changed.
            self.__call__ = take()

        self.aside = Aside(label, work, swap, backend=request.backend, nice=request.nice)


def _unkeyable(miss: Miss) -> StaleEntryError | None:
    if miss.cause != "unkeyable":
        return None
    return StaleEntryError(
        f"nothing could tell at the end whether the model is still what was compiled: {miss.reason}. Mend "
        "that, or compile it before it serves (on_miss='compile')."
    )


def serve_eagerly(wanted: Wanted, miss: Miss) -> CompiledModel:
    """Serve a model that has no direct hit as it is, and compile it in a child process.

    Raises:
        OptionError: No child process can compile here.
    """
    check_children()
    return EagerFirst(wanted, miss)


def check_children() -> None:
    """Refuse ``on_miss="eager"`` where no child process can compile."""
    if not children.available():
        raise OptionError(
            "on_miss='eager' compiles in a forked child, and none can be forked here: CUDA is in use, or "
            "this is a daemonic process of multiprocessing. Prewarm the model, or use on_miss='compile'.",
            option="on_miss",
        )
