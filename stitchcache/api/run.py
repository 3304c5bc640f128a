"""One compilation: what is known of it, and the direct road."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from stitchcache.api.open import open_artifact
from stitchcache.api.request import OnProgress, Progress, Request, devices_of, environment_flag
from stitchcache.artifact.record import Artifact
from stitchcache.cache import Cache
from stitchcache.codegen.bytecode import CodeObjects
from stitchcache.errors import BackendError, EntryFormatError, LinkError, UntrustedEntryError
from stitchcache.keys.check import check_sources
from stitchcache.keys.target import TargetKey, target_key
from stitchcache.keys.values import Shared
from stitchcache.runtime.mismatch import explain_mismatch
from stitchcache.runtime.model import CompiledModel
from stitchcache.torchside import tree
from stitchcache.types import TargetRecord

if TYPE_CHECKING:
    from stitchcache.api.preload import Preloaded
    from stitchcache.explanation import MissFacts

log = logging.getLogger("stitchcache")

T = TypeVar("T")


class Run:
    """One compilation; lives for one call.

    Args:
        model: The model.
        args: Example positional arguments.
        kwargs: Example keyword arguments.
        request: Options.
        cache: Where to look and store.
        on_progress: Gets told what happens.
        preloaded: What was made ready for this; used where it is what is found to be needed.

    Attributes:
        reason: Why there was no direct hit, as far as is known.
        cause: The same in a word, for the statistics: ``new``, ``unkeyable``, ``sources``, ``entry``,
            ``example``, ``piece`` or ``refused``.
        record: What the target key leads to, where it was found.
        near: What a miss found out beyond its reason: ``hint`` for the log, and facts for ``explain()``.
        objects: Code objects of the generated source: those of a record that may be served, and new ones.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        request: Request,
        cache: Cache,
        on_progress: OnProgress | None,
        preloaded: Preloaded | None = None,
    ) -> None:
        self._began = time.perf_counter()
        self.model, self.args, self.kwargs = model, args, kwargs
        self.request, self.cache, self._on_progress = request, cache, on_progress
        self._preloaded = preloaded
        self.timings: dict[str, float] = {}
        self.label = request.label or type(model).__qualname__
        leaves, spec = tree.flatten((args, kwargs))
        self._leaves = leaves
        self.shared = Shared()
        paths = tree.leaf_paths(model.forward, args, kwargs)
        self.device, self.devices = devices_of(model, leaves)
        self.target = self.timed(
            "key", lambda: self._target_key(list(zip(paths, leaves, strict=True)), tree.dumps(spec))
        )
        self.reason = self.target.reason or "no entry for this target"
        self.cause = "new" if self.target.key is not None else "unkeyable"
        self.record: TargetRecord | None = None
        self.near: MissFacts | None = None
        self.objects = CodeObjects()

    def direct(self) -> CompiledModel | None:
        """Load without tracing; ``None`` is a miss, and ``reason`` says why.

        Raises:
            StaleEntryError: ``STITCHCACHE_AUDIT`` is set, and the model's graph is another one.
        """
        self.tell("lookup")
        artifact = self.lookup()
        if artifact is None:
            return None
        if environment_flag("STITCHCACHE_AUDIT"):
            from stitchcache.api.audit import audit

            audit(self, artifact)
        return self.open(artifact, "direct")

    def lookup(self) -> Artifact | None:
        """The entry that the target key leads to; ``None`` is a miss, and ``reason`` says why."""
        key = self.target.key
        records = self.cache.get_target(key) if key is not None else ()
        # The reason and the record of a miss are those of the newest, which is most like what runs here.
        self.record = records[0] if records else None
        for record in records:
            changed = self.timed("sources", partial(check_sources, record, self.shared))
            if changed is None:
                self.record = record
                found = self._of_record(record)
                if found is not None or record.refused is not None:
                    return found
            elif record is records[0]:
                self.reason, self.cause = (
                    (changed, "sources") if record.refused is None else (record.refused, "unkeyable")
                )
        return None

    def _of_record(self, record: TargetRecord) -> Artifact | None:
        """The entry of a record whose sources are unchanged."""
        if record.refused is not None:
            self.reason, self.cause = record.refused, "unkeyable"
            return None
        artifact = self.get(record.graph_hash)
        if artifact is None or artifact.input_spec is None:
            self.reason, self.cause = f"the entry {record.graph_hash[:12]} is gone or damaged", "entry"
            return None
        # torch.export may tie two sizes together by the example's; another example is another target.
        misfit = explain_mismatch(artifact.input_spec, self._leaves)
        if misfit is not None:
            self.reason, self.cause = f"the example does not fit what was captured: {misfit}", "example"
            return None
        self.objects = CodeObjects(record.code)
        return artifact

    def open(self, artifact: Artifact, hit: str) -> CompiledModel | None:
        """Load and link an artifact; ``None``, and a warning, if that cannot be done here."""
        try:
            # Held, so that no process evicts a blob between its check and its loading.
            with self.cache.hold(artifact):
                opened = self.timed("load", lambda: self._opened(artifact))
            if opened is not None:
                return self.finish(artifact, *opened, hit)
            self.reason = f"a piece of entry {artifact.graph_hash[:12]} is missing or damaged"
            self.cause = "piece"
        except (UntrustedEntryError, EntryFormatError, LinkError, BackendError) as error:
            log.warning("%s: entry %s is not used: %s", self.label, artifact.graph_hash[:12], error)
            self.reason, self.cause = error.message, "refused"
        except OSError as error:
            # Checked a moment ago, and now it cannot be read: too many open files, a stale network file.
            log.warning("%s: entry %s cannot be loaded: %s", self.label, artifact.graph_hash[:12], error)
            self.reason, self.cause = str(error), "piece"
        return None

    def _opened(self, artifact: Artifact) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
        ready = None
        if self._preloaded is not None and self.device == "cpu":
            ready = self._preloaded.take(artifact.graph_hash)
        return open_artifact(artifact, self.cache, self.device, ready)

    def finish(
        self, artifact: Artifact, pieces: Mapping[str, Any], constants: Mapping[str, Any], hit: str | None
    ) -> CompiledModel:
        """Link what is loaded, and say so."""
        compiled = self.timed(
            "link",
            lambda: CompiledModel(
                artifact, self.model, pieces, constants, cache_hit=hit, objects=self.objects
            ),
        )
        self._count(artifact, hit)
        self.timings["total"] = time.perf_counter() - self._began
        compiled.timings = dict(self.timings)
        compiled.lookup = (self.label, self.target, "" if hit == "direct" else self.reason, self.near)
        said = f"{hit} hit" if hit else "compiled"
        hint = self.near.hint if self.near is not None else ""
        because = f" (no direct hit: {self.reason}{hint})" if hit != "direct" else ""
        log.info(
            "%s: %s %s in %.3f s%s",
            self.label,
            said,
            artifact.graph_hash[:12],
            self.timings["total"],
            because,
        )
        self.tell("done")
        return compiled

    def _count(self, artifact: Artifact, hit: str | None) -> None:
        """Add to the store's statistics."""
        spent = time.perf_counter() - self._began
        self.cache.count(f"hit.{hit}" if hit else "compiled")
        if hit != "direct":
            self.cache.count(f"miss.{self.cause}")
        self.cache.count("microseconds.spent", int(spent * 1e6))
        if hit:
            self.cache.count("microseconds.saved", max(0, int((artifact.compile_seconds - spent) * 1e6)))

    def get(self, graph_hash: str) -> Artifact | None:
        """An entry; one that cannot be trusted is a miss and a warning."""
        known = self._preloaded.artifact(graph_hash) if self._preloaded else None
        if known is not None:
            return known
        try:
            return self.cache.get(graph_hash)
        except UntrustedEntryError as error:
            log.warning("%s", error)
            return None

    def _target_key(self, leaves: list[tuple[str, Any]], tree_text: str) -> TargetKey:
        request = self.request
        return target_key(
            self.model,
            leaves,
            tree_text,
            request.dynamic_shapes,
            request.splitting_ops,
            request.size_ranges,
            request.backend,
            request.backend_options,
            request.key_factors,
            self.shared,
        )

    def timed(self, stage: str, work: Callable[[], T]) -> T:
        """Do something and add its seconds to a stage."""
        began = time.perf_counter()
        try:
            return work()
        finally:
            self.timings[stage] = self.timings.get(stage, 0.0) + time.perf_counter() - began

    def tell(self, stage: str, done: int = 0, total: int = 0, left: float | None = None) -> None:
        """Report progress."""
        if self._on_progress is not None:
            seconds = time.perf_counter() - self._began
            self._on_progress(
                Progress(target=self.label, stage=stage, done=done, total=total, seconds=seconds, left=left)
            )
