"""The look: one call of the model itself beside what is about to be served in its place.

Keys and recorded sources decide that a start may skip the trace; the look decides that they were right. It
sees what the example shows: results, and what is written into arguments, parameters and buffers.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from stitchcache.errors import PieceMismatchError, StaleEntryError, StoreWriteError
from stitchcache.pipeline.compare import HIGH, Compared, disagreement, judged, outcome_of, run_both
from stitchcache.state import as_it_was, state_of, tensor_at
from stitchcache.torchside import tree
from stitchcache.torchside.tensors import has_fakes, version_of
from stitchcache.types import Check, CheckRecord, OutputBound

if TYPE_CHECKING:
    from stitchcache.artifact.record import Artifact
    from stitchcache.cache import Cache
    from stitchcache.capture import Capture
    from stitchcache.pipeline.find import Wanted
    from stitchcache.runtime.model import CompiledModel

log = logging.getLogger("stitchcache")

# What is still taken for rounding at a cold compile, where the captured graph was run op by op and agreed
# with the model, and each piece agreed with its graph: the root of the mean square, relative.
_CEILING = {torch.float64: 1e-6, torch.complex128: 1e-6, torch.float32: 1e-2, torch.complex64: 1e-2}
# Share of whole numbers (argmax, a comparison) that rounding may turn over in the same case.
_TURNED = 0.05
_LASTING = ("buffer:", "parameter:", "attribute:")
NO_WEIGHTS = "the model or its example has no data"


def looker(
    wanted: Wanted,
    captured: Capture | None = None,
    on_mismatch: Callable[[str], None] = lambda _reason: None,
) -> Callable[[CompiledModel], None]:
    """What compares a callable with the model before anybody gets it, as far as the request asks for it.

    A hit that disagrees raises ``StaleEntryError`` and becomes a miss; a fresh compilation that does raises
    ``ModelMismatchError``. What was seen goes into ``check``, and with a new artifact.

    Args:
        wanted: The model, its example and the request.
        captured: The graph that a fresh compilation comes from.
        on_mismatch: Gets the reason of a mismatch, in whichever thread finds it.
    """
    request, site = wanted.request, wanted.site
    where = (wanted.model, wanted.args, wanted.kwargs)

    def note(compiled: CompiledModel, outcome: Check) -> None:
        site.cache.count(f"look.{outcome.state}")
        if outcome.state == "mismatch":
            # Here a user's choice to go on with the model itself would go.
            compiled.refuse(_stale(compiled, outcome, site.cache))
            on_mismatch(outcome.reason)
        compiled.check = outcome

    def at(compiled: CompiledModel) -> None:
        opaque = [op for op in request.splitting_ops if request.effects.get(op.rpartition(".")[0] or op)]
        reason = "check='none'" if request.checked == "none" else ""
        if opaque:
            reason = f"splitting op {opaque[0]} writes what cannot be put back, as 'stitchcache.effects' says"
        if compiled.cache_hit is None and captured is not None:
            outcome, record = look_cold(*where, compiled, captured, request.effects, reason)
            compiled.artifact = replace(compiled.artifact, check=record)
            note(compiled, outcome)
        elif reason:
            compiled.check = Check(state="unchecked", reason=reason)
        elif request.checked == "background":
            look_later(*where, compiled, request.effects, lambda outcome: note(compiled, outcome))
        else:
            outcome, first = look(*where, compiled, request.effects)
            note(compiled, outcome)
            compiled.raise_refusal()
            if first is not None:
                _keep(compiled, first, site.cache)

    return at


def _keep(compiled: CompiledModel, record: CheckRecord, cache: Cache) -> None:
    """Store what was measured with an entry that was compiled where there was nothing to compare with."""
    compiled.artifact = replace(compiled.artifact, check=record)
    try:
        cache.put(compiled.artifact)
    except StoreWriteError as error:
        log.debug("what was measured of entry %s is not stored: %s", compiled.graph_hash[:12], error)


def look(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    compiled: CompiledModel,
    effects: Mapping[str, bool],
) -> tuple[Check, CheckRecord | None]:
    """Compare what a hit gave with the model itself, on the example.

    Args:
        model: As it is.
        args: Example positional arguments; left as they are.
        kwargs: Example keyword arguments; likewise.
        compiled: What is about to be served.
        effects: Ops that write what their schemas do not show (true), or that only seem to (false).

    Returns:
        ``agreed``, ``mismatch`` or ``unchecked``; and what was measured, if the entry has no measure yet.
    """
    began = time.perf_counter()
    record = compiled.artifact.check
    if _no_data(model, args, kwargs):
        return outcome_of("unchecked", NO_WEIGHTS, began), None
    writes = written_by(compiled.artifact, model, args, kwargs)
    both = run_both(model, compiled, args, kwargs, writes=writes, effects=effects)
    outcome = judged(both, record, began)
    first = outcome.state == "agreed" and record is not None and record.state == "unchecked"
    return outcome, _record(both.items) if first else None


def _record(items: Sequence[Compared]) -> CheckRecord:
    bounds = [
        OutputBound(name=item.name, difference=item.difference, magnitude=item.magnitude) for item in items
    ]
    return CheckRecord(state="compared", bounds=tuple(bounds))


def look_cold(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    compiled: CompiledModel,
    captured: Capture,
    effects: Mapping[str, bool],
    skip: str = "",
) -> tuple[Check, CheckRecord]:
    """Compare what was compiled now with the model itself; what is seen becomes the measure for later starts.

    Args:
        model: As it is.
        args: Example positional arguments.
        kwargs: Example keyword arguments.
        compiled: Not stored yet.
        captured: The graph that it was compiled from.
        effects: As for :func:`look`.
        skip: Why nothing is to be compared; ``""`` compares.

    Raises:
        ModelMismatchError: The captured graph does something else than the model.
        PieceMismatchError: The graph is right, and the compiled pieces together are not.
    """
    from stitchcache.pipeline.parted import (
        check_again,
        check_graph,
        read_paths,
        undefined_results,
        written_names,
    )

    began = time.perf_counter()
    names = written_names(captured)
    marks = tuple(OutputBound(name=name, difference=0.0, magnitude=0.0) for name in names)

    def unchecked(reason: str) -> tuple[Check, CheckRecord]:
        return outcome_of("unchecked", reason, began), CheckRecord(
            state="unchecked", reason=reason, bounds=marks
        )

    if skip or _no_data(model, args, kwargs):
        return unchecked(skip or NO_WEIGHTS)
    writes, reads = written_by(compiled.artifact, model, args, kwargs, names), read_paths(captured.bound)
    # Cold starts have the time to put plain objects back, too.
    with as_it_was(model) as changed:
        both = run_both(model, compiled, args, kwargs, writes=writes, effects=effects, reads=reads)
        moved = both.moved or changed()
    if both.unchecked:
        return unchecked(both.unchecked)
    skipped = frozenset() if both.drew else undefined_results(captured, both.items)
    items = [item for item in both.items if item.name not in skipped]
    wrong = next((item for item in items if disagreement(item)), None)
    with as_it_was(model):
        if both.fails or wrong is not None:
            check_graph(model, args, kwargs, captured, writes, effects, skipped, both.fails)
            if wrong is not None and both.drew and not wrong.fact:
                return unchecked(f"the model draws random numbers, and {wrong.name} {disagreement(wrong)}")
            _refuse_too_far(items, both.fails)
        if moved and not both.drew and all(item.name.startswith("output") for item in both.items):
            check_again(model, args, kwargs)
    return outcome_of("agreed", "", began), _record(items)


def _refuse_too_far(items: Sequence[Compared], fails: str) -> None:
    """The graph is the model, and pieces agreed with it one by one; rounding may still add up too far."""
    for item in items:
        most = _TURNED if item.dtype is None else _CEILING.get(item.dtype, HIGH)
        if item.fact or not item.spread <= most:
            fails = fails or f"{item.name} {disagreement(item)}"
    if fails:
        raise PieceMismatchError(
            f"the compiled model disagrees with the model, and the graph between them does not: {fails}. "
            "Nothing was stored. Use backend='eager', or split at an op that keeps the pieces smaller.",
            backend="",
            piece="",
        )


def look_later(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    compiled: CompiledModel,
    effects: Mapping[str, bool],
    on_end: Callable[[Check], None],
) -> None:
    """Look in a thread, on copies of the arguments; ``compiled.check`` tells how it stands.

    After a mismatch each call raises :class:`~stitchcache.errors.StaleEntryError`. A model whose forward
    writes parameters or buffers, or draws random numbers, is not run beside the user's calls: the first kind
    is looked at before this returns, the second kind not at all.

    Args:
        model: As for :func:`look`, like the rest.
        args: Likewise.
        kwargs: Likewise.
        compiled: Likewise.
        effects: Likewise.
        on_end: Gets the outcome, in the thread.
    """
    artifact = compiled.artifact
    if lasting_names(artifact) or _no_data(model, args, kwargs):
        outcome, _ = look(model, args, kwargs, compiled, effects)
        on_end(outcome)
        compiled.raise_refusal()
        return
    # The usual look makes no copies.
    from stitchcache.pieces.check import clone_all

    leaves, spec = tree.flatten((args, dict(kwargs)))
    mine, named = tree.unflatten(clone_all(leaves), spec)
    # The function that is bound now: rebind() makes another one.
    subject, modes = compiled.__call__, _autocast(leaves)
    compiled.check = Check(state="pending")

    def run() -> None:
        began, outcome = time.perf_counter(), None
        state = list(state_of(model).values())
        before = _versions(state)
        try:
            with modes():
                both = run_both(model, subject, mine, named, effects=effects, apart=True)
            outcome = judged(both, artifact.check, began)
            if outcome.state == "mismatch" and _versions(state) != before:
                outcome = outcome_of("unchecked", "the model was changed while it was looked at", began)
        finally:
            outcome = outcome or outcome_of("unchecked", "looking at the model ended in an error", began)
            on_end(outcome)
            atexit.unregister(thread.join)

    thread = threading.Thread(target=run, name="stitchcache look", daemon=True)
    # A process that ended in the middle of a forward could crash on its way out.
    atexit.register(thread.join)
    thread.start()


def _stale(compiled: CompiledModel, outcome: Check, cache: Cache) -> StaleEntryError:
    """The error of a hit that disagreed with the model."""
    caught = cache.counted().get("look.mismatch", 0)
    # The graph of a graph hit was captured just now: whether it is the model, compiling it will tell.
    report = _REPORT.format(caught=caught) if compiled.cache_hit == "direct" else ""
    name = compiled.graph_hash[:12]
    return StaleEntryError(
        f"the model itself gives another result than entry {name}: {outcome.reason}.{report}",
        expected=compiled.graph_hash,
        output=outcome.output,
        difference=outcome.difference,
        caught=caught,
    )


_REPORT = (
    " A wrong direct hit that was caught is a bug of stitchcache (the look has found {caught} wrong in this "
    "cache): please report it, with what 'stitchcache doctor --json' and 'stitchcache explain TARGET --trace "
    "--json' print."
)


def written_by(
    artifact: Artifact,
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    names: Sequence[str] | None = None,
) -> dict[str, torch.Tensor]:
    """Tensors that an artifact's pieces may write, and what to call them.

    Args:
        artifact: The artifact.
        model: Whose tensors it binds.
        args: Example positional arguments.
        kwargs: Example keyword arguments.
        names: Those of the model, where they are known; else those of the artifact's record.
    """
    leaves, _ = tree.flatten((args, dict(kwargs)))
    specs = artifact.input_spec.leaves if artifact.input_spec is not None else ()
    found = {f"input:{s.path}": leaf for leaf, s in zip(leaves, specs, strict=False) if s.kind == "inout"}
    for name in lasting_names(artifact) if names is None else names:
        tensor = tensor_at(model, name.partition(":")[2])
        if tensor is not None:
            found[name] = tensor
    return found


def lasting_names(artifact: Artifact) -> list[str]:
    """Tensors of the model that an artifact's pieces may write, such as ``buffer:cache``."""
    mutations = artifact.output_spec.mutations if artifact.output_spec is not None else ()
    if artifact.check is None:
        # Older entries do not tell what their pieces write.
        kinds = ("buffer", "attribute")
        noted = [f"{binding.kind}:{binding.name}" for binding in artifact.bindings if binding.kind in kinds]
    else:
        noted = [bound.name for bound in artifact.check.bounds]
    return [name for name in dict.fromkeys([*noted, *mutations]) if name.startswith(_LASTING)]


def _no_data(model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return has_fakes([*tree.flatten((args, dict(kwargs)))[0], *state_of(model).values()])


def _autocast(leaves: Sequence[Any]) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """The caller's autocast, for another thread."""
    devices = {leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)}
    on = {device: torch.get_autocast_dtype(device) for device in devices if torch.is_autocast_enabled(device)}

    @contextlib.contextmanager
    def modes() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for device, dtype in on.items():
                stack.enter_context(torch.autocast(device, dtype=dtype))
            yield

    return modes


def _versions(tensors: Sequence[torch.Tensor]) -> list[int]:
    return [version_of(tensor) for tensor in tensors if not tensor.is_inference()]
