"""Eager first: the model serves as it is while a child process compiles it; then the artifact takes over.

Only the direct lookup runs in this process, and at the end the loading of what the child stored.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from stitchcache import collection_paused
from stitchcache.cache import Cache
from stitchcache.errors import StaleEntryError, check_kind
from stitchcache.explanation import differences_text, explain_differences
from stitchcache.pipeline import start
from stitchcache.pipeline.aside import Aside, with_few_jobs
from stitchcache.pipeline.find import Miss, OnProgress, Request, Wanted, find, want
from stitchcache.runtime.eager import as_it_is
from stitchcache.runtime.model import CompiledModel
from stitchcache.types import Artifact, Check


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
            served = mine()
            if served is not None:
                served._take(made, *given)

        refused = (
            "nothing could tell at the end whether the model is still what was compiled: "
            f"{miss.reason}. Mend that, or compile it before it serves (on_miss='compile')."
        )
        self._aside = Aside(
            self,
            wanted.site.label,
            work,
            take,
            backend=request.backend,
            nice=request.nice,
            refused=refused if miss.cause == "unkeyable" else "",
        )

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

    Aside(call, label, work, swap, backend=request.backend, nice=request.nice)
    return call
