"""The look: one call of the model itself beside what is about to be served in its place.

Keys and recorded sources decide that a start may skip the trace; the look decides that they were right. It
sees what the example shows: results, and what is written into arguments, parameters and buffers.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from stitchcache.errors import OptionError, StaleEntryError, StoreWriteError, check_kind
from stitchcache.pipeline import store_target
from stitchcache.pipeline.find import check_arguments
from stitchcache.state import clone_all, drawn_back, plain_tensors, state_of, taken_apart, tensor_at
from stitchcache.torchside import has_fakes, tree, version_of
from stitchcache.types import LOOK_THREAD, Check, CheckRecord, OutputBound, TargetRecord

if TYPE_CHECKING:
    from stitchcache.compare import Beside, Both, Compared
    from stitchcache.pipeline.find import Wanted
    from stitchcache.runtime.cuda_graphs import Graphs
    from stitchcache.runtime.model import CompiledModel
    from stitchcache.types import Artifact

log = logging.getLogger("stitchcache")

_FIRST_CALLS = 0.1  # seconds that a look in the background waits
LASTING = ("buffer:", "parameter:", "attribute:")


def looker(
    wanted: Wanted,
    cold: Callable[[CompiledModel, str], tuple[Check, CheckRecord]] | None = None,
    record: TargetRecord | None = None,
) -> Callable[[CompiledModel], None]:
    """What compares a callable with the model before anybody gets it, as far as the request asks for it.

    A hit that disagrees raises ``StaleEntryError`` and becomes a miss, and ``record``, which led to it, is
    refused until a trace has replaced it. ``cold`` looks at a fresh compilation, unless told why not.
    """
    cache, effects = wanted.site.cache, wanted.request.effects

    def note(compiled: CompiledModel, outcome: Check, began: float) -> None:
        cache.count(f"look.{outcome.state}")
        if outcome.state == "mismatch":
            compiled.refuse(_stale(compiled, outcome, cache.counted().get("look.mismatch", 0)))
            if record is not None:
                store_target(wanted, replace(record, refused=outcome.reason))
        compiled.check = replace(outcome, seconds=time.perf_counter() - began)

    def compared(
        compiled: CompiledModel, artifact: Artifact, before: Beside | None = None
    ) -> tuple[Beside, Both, Check]:
        where, writes = (wanted.model, wanted.args, wanted.kwargs), _written_by(wanted, artifact)
        compare = partial(_compare, *where, compiled, artifact.check, before, writes=writes, effects=effects)
        # Where somebody replaced a kernel of torch's there is no key, and no direct hit.
        direct = compiled.cache_hit == "direct"
        found = compare(quick=direct)
        return compare() if direct and found[2].state != "agreed" else found

    def at(compiled: CompiledModel) -> None:
        began, artifact, reason = time.perf_counter(), compiled.artifact, _why_not(wanted)
        before = look_at(compiled, artifact, reason, began)
        graphs = compiled.cuda_graphs
        if graphs is not None and graphs.due and compiled.check.state == "agreed":
            # The call that was looked at made it ready to be recorded. What is served is recorded, so it is
            # looked at once more. After a hit the model has run for that.
            _refuse_graphs(compared(compiled, compiled.artifact, before)[2])
        if graphs is not None and graphs.wanted.at == "load" and not reason:
            _record(wanted, compiled, graphs)

    def look_at(compiled: CompiledModel, artifact: Artifact, reason: str, began: float) -> Beside | None:
        if compiled.cache_hit is None and cold is not None:
            outcome, measured = cold(compiled, reason)
            compiled.artifact = replace(artifact, check=measured)
            note(compiled, outcome, began)
        elif reason:
            compiled.check = Check(state="unchecked", reason=reason)
        elif wanted.request.checked == "background" and not _lasting_names(artifact):
            _look_later(wanted, compiled, lambda outcome: note(compiled, outcome, began))
        else:
            beside, both, outcome = compared(compiled, artifact)
            note(compiled, outcome, began)
            compiled.raise_refusal()
            unmeasured = artifact.check is not None and artifact.check.state == "unchecked"
            if unmeasured and compiled.check.state == "agreed":
                compiled.artifact = replace(artifact, check=record_of(both.items))
                try:
                    cache.put(compiled.artifact)
                except StoreWriteError as error:
                    log.debug("what was measured of entry %s is not stored: %s", artifact.graph_hash, error)
            return beside
        return None

    return at


def _record(wanted: Wanted, compiled: CompiledModel, graphs: Graphs) -> None:
    """Record every size that gets a graph, and put back what the calls for it write."""
    # Most starts record nothing.
    from stitchcache.torchside.watch import watch

    taken = list(compiled.artifact.taken)
    _, tree_spec = tree.flatten((wanted.args, dict(wanted.kwargs)))
    memory = watch({})
    for tensor in _written_by(wanted, compiled.artifact).values():
        memory.save(tensor)
    try:
        with drawn_back(wanted.leaves), torch.no_grad():
            for made in graphs.examples([wanted.leaves[place] for place in taken]):
                leaves = list(wanted.leaves)
                for place, leaf in zip(taken, made, strict=True):
                    leaves[place] = leaf
                args, kwargs = tree.unflatten(leaves, tree_spec)
                # The second call is recorded.
                for _ in range(2):
                    compiled(*args, **kwargs)
    finally:
        memory.put_back()


def _refuse_graphs(outcome: Check) -> None:
    if outcome.state == "mismatch":
        raise OptionError(
            f"cuda_graphs: replayed as CUDA graphs the model gives another result: {outcome.reason}. An op "
            "that is recorded does something in Python that a graph does not repeat. Leave custom ops "
            "outside (mode='pieces'), or record nothing.",
            option="cuda_graphs",
        )


def _why_not(wanted: Wanted) -> str:
    """Why nothing is compared; ``""`` where it is."""
    request = wanted.request
    if request.checked == "none":
        return "check='none'"
    for op in request.splitting_ops:
        if request.effects.get(op.rpartition(".")[0] or op):
            return f"splitting op {op} writes what cannot be put back, as 'stitchcache.effects' says"
    no_data = has_fakes([*wanted.leaves, *state_of(taken_apart(wanted.model)).values()])
    return "the model or its example has no data" if no_data else ""


def _compare(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    subject: Callable[..., Any],
    record: CheckRecord | None = None,
    before: Beside | None = None,
    **how: Any,
) -> tuple[Beside, Both, Check]:
    """What ran both (``before``, or one made from ``how``), what that gave, and what it comes to."""
    # A look in the background imports this in its thread.
    from stitchcache.compare import Beside, judged

    beside = before or Beside(model, args, kwargs, **how)
    both = beside.run(subject, again=before is not None)
    return beside, both, judged(both, record)


def record_of(items: Iterable[Compared]) -> CheckRecord:
    """What a comparison measured, as an entry keeps it."""
    bounds = [OutputBound(name=i.name, difference=i.difference, magnitude=i.magnitude) for i in items]
    return CheckRecord(state="compared", bounds=tuple(bounds))


def _look_later(wanted: Wanted, compiled: CompiledModel, on_end: Callable[[Check], None]) -> None:
    """Look in a thread, on copies of the arguments; a model that writes or draws beside them is stopped."""
    _, spec = tree.flatten((wanted.args, dict(wanted.kwargs)))
    args, kwargs = tree.unflatten(clone_all(wanted.leaves), spec)
    devices = {leaf.device.type for leaf in wanted.leaves if isinstance(leaf, torch.Tensor)}
    autocast = {d: torch.get_autocast_dtype(d) for d in devices if torch.is_autocast_enabled(d)}
    # The function that is bound now: rebind() makes another one.
    model, subject, record = wanted.model, compiled.__call__, compiled.artifact.check
    effects = wanted.request.effects
    compiled.check = Check(state="pending")

    def run() -> None:
        # The first calls come first: beside them this would take turns with them.
        time.sleep(_FIRST_CALLS)
        outcome = Check(state="unchecked", reason="looking at the model ended in an error")
        state = list(state_of(model).values())
        before = [*map(version_of, state)]
        try:
            with ExitStack() as modes:
                for device, dtype in autocast.items():
                    modes.enter_context(torch.autocast(device, dtype=dtype))
                *_, outcome = _compare(model, args, kwargs, subject, record, effects=effects, apart=True)
            if outcome.state == "mismatch" and [*map(version_of, state)] != before:
                outcome = Check(state="unchecked", reason="the model was changed while it was looked at")
        finally:
            on_end(outcome)
            atexit.unregister(thread.join)

    thread = threading.Thread(target=run, name=LOOK_THREAD, daemon=True)
    # A process that ended in the middle of a forward could crash on its way out.
    atexit.register(thread.join)
    thread.start()


def _stale(compiled: CompiledModel, outcome: Check, caught: int) -> StaleEntryError:
    said = f"the model itself gives another result than entry {compiled.graph_hash[:12]}: {outcome.reason}."
    # The graph of a graph hit was captured just now: whether it is the model, compiling it will tell.
    if compiled.cache_hit == "direct":
        said += (
            f" A wrong direct hit that was caught is a bug of stitchcache (the look has found {caught} wrong "
            "in this cache): please report it, with what 'stitchcache doctor --json' and "
            "'stitchcache explain TARGET --trace --json' print."
        )
    return StaleEntryError(
        said,
        expected=compiled.graph_hash,
        output=outcome.output,
        difference=outcome.difference,
        caught=caught,
    )


def _written_by(wanted: Wanted, artifact: Artifact) -> dict[str, torch.Tensor]:
    """Tensors that an artifact's pieces may write, and what to call them."""
    inputs = zip(artifact.leaves, wanted.leaves, strict=False)
    found = {f"input:{spec.path}": leaf for spec, leaf in inputs if spec.kind == "inout"}
    lasting = {name: tensor_at(wanted.model, name.partition(":")[2]) for name in _lasting_names(artifact)}
    return found | {name: tensor for name, tensor in lasting.items() if tensor is not None}


def _lasting_names(artifact: Artifact) -> list[str]:
    """Tensors of the model that an artifact's pieces may write, such as ``buffer:cache``."""
    mutations = artifact.output_spec.mutations if artifact.output_spec is not None else ()
    if artifact.check is None:
        # Older entries do not tell what their pieces write.
        kinds = ("buffer", "attribute")
        noted = [f"{binding.kind}:{binding.name}" for binding in artifact.bindings if binding.kind in kinds]
    else:
        noted = [bound.name for bound in artifact.check.bounds]
    return [name for name in dict.fromkeys([*noted, *mutations]) if name.startswith(LASTING)]


def verify(
    model: torch.nn.Module,
    compiled: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
) -> Check:
    """Compare any callable with the model that it stands for, as the look does.

    For ``torch.compile(model, ...)``, say, whose backend sees only the graphs that Dynamo made. Both run once
    from the same state, and what they write is put back.

    Args:
        model: The model itself.
        compiled: Called as the model is.
        args: Positional arguments.
        kwargs: Keyword arguments.

    Returns:
        ``state`` is ``"agreed"``, ``"mismatch"`` or ``"unchecked"``, with the ``reason``.

    Raises:
        OptionError: An argument is of a wrong type.
    """
    check_kind("model", model, torch.nn.Module, "a torch.nn.Module")
    check_kind("compiled", compiled, Callable, "a function, or what compile returned")
    check_arguments(args, {} if kwargs is None else kwargs)
    began, given = time.perf_counter(), dict(kwargs or {})
    # What it writes is not known, so whatever it may write is kept.
    writes = {f"buffer:{name}": buffer for name, buffer in model.named_buffers()}
    writes |= {f"attribute:{path}": tensor for path, tensor in plain_tensors(model).items()}
    paths = tree.leaf_paths(getattr(model, "forward", model), args, given)
    leaves = zip(paths, tree.flatten((args, given))[0], strict=True)
    writes |= {f"input:{path}": leaf for path, leaf in leaves if isinstance(leaf, torch.Tensor)}
    *_, outcome = _compare(model, args, given, compiled, writes=writes)
    return replace(outcome, seconds=time.perf_counter() - began)
