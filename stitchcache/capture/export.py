"""Capture a model with ``torch.export`` (non-strict), and say what the capture promises.

The exported graph takes parameters, buffers and lifted constants as placeholders before the user's inputs,
and writes buffers in place, as the model itself does.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import GraphModule
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.overrides import TorchFunctionMode

from stitchcache.capture.advice import advice
from stitchcache.capture.contract import input_spec
from stitchcache.capture.regions import ambient_modes, inline_regions
from stitchcache.compare import unchanged
from stitchcache.errors import CaptureError, StitchCacheError
from stitchcache.graph.effects import written_placeholders
from stitchcache.graph.symbols import SymbolNames
from stitchcache.state import clone_all, drawn_back, elements_of, plain_tensors, state_of, taken_apart
from stitchcache.torchside import has_fakes, is_wrapper, storage_id, tree
from stitchcache.torchside.ops import made_of_others
from stitchcache.types import InputSpec, OutputSpec

_VALUE_READS = frozenset(
    {"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__complex__", "__index__", "__array__"}
)
_KINDS = {InputKind.PARAMETER: "parameter", InputKind.BUFFER: "buffer", InputKind.CONSTANT_TENSOR: "constant"}


@dataclass(frozen=True, slots=True)
class BoundTensor:
    """A placeholder that is fed from the model, or from the artifact itself."""

    placeholder: str  # its name in the graph
    name: str  # qualified name in the model, or path; for a constant, torch's name for it
    kind: str  # ``parameter``, ``buffer``, ``attribute`` or ``constant``
    tensor: torch.Tensor
    aliases: tuple[str, ...] = ()  # paths to the same tensor that the forward may have gone by


@dataclass(frozen=True, slots=True)
class Capture:
    """A model as one graph, and the contract that goes with it."""

    gm: GraphModule  # flat: bound tensors first, then one placeholder a leaf of the inputs
    bound: tuple[BoundTensor, ...]  # for the first placeholders, in order
    user_inputs: tuple[str, ...]  # names of the remaining placeholders
    input_spec: InputSpec
    output_spec: OutputSpec
    example: tuple[Any, ...]  # the leaves that it was captured with
    names: SymbolNames  # canonical names of the graph's symbols


def capture(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: Any = None
) -> Capture:
    """Trace a model into one graph, as ``torch.export.export``; a CaptureError says where that fails."""
    leaves, spec = tree.flatten((args, dict(kwargs)))
    whole, model = model, taken_apart(model)
    state, plain = state_of(model), plain_tensors(model)
    _refuse_unfinished([*state.values(), *leaves])
    if any(base.__name__ == "CompiledModel" for module in model.modules() for base in type(module).__mro__):
        raise CaptureError(
            "A part of the model is compiled already. Compile the model as it was before.",
            reason="a compiled part",
        )
    paths = tree.leaf_paths(model.forward, args, dict(kwargs))
    for name, tensor in (*state.items(), *zip(paths, leaves, strict=True)):
        if is_wrapper(tensor):
            raise CaptureError(
                f"{name} is a {type(tensor).__qualname__}, a tensor that is made of others. Parameters and "
                "buffers may be, as torchao quantizes them, but not arguments, nor torch's own (DTensor). "
                "Pass plain tensors, or compile the model as it was before it was converted.",
                reason=f"{name} is a {type(tensor).__qualname__}",
            )
    leaves = _separate(leaves, [*state.values(), *plain.values()])
    example: tuple[tuple[Any, ...], dict[str, Any]] = tree.unflatten(leaves, spec)
    # torch runs an op of which every argument is such a tensor for real.
    real = [tensor for tensor in plain.values() if not has_fakes([tensor])]
    calls = _Calls(real, opens=model is not whole)
    try:
        # A mode slows the trace down, so only where there is something to see. What the forward keeps of a
        # trace has no data, and would spoil the model.
        seen = calls if real or model is not whole else nullcontext()
        with torch.no_grad(), unchanged(model, registered=False), drawn_back(()), seen:
            program = torch.export.export(model, *example, dynamic_shapes=dynamic_shapes, strict=False)
            _refuse_new_buffers(state, state_of(model))
    except StitchCacheError:
        raise
    except Exception as error:
        # A boundary: the user's forward runs here, and a checker of torch's with errors of its own.
        way_out = advice(model, args, kwargs, dynamic_shapes, error)
        raise _capture_error(model, error, way_out) from error
    gm = program.graph_module
    bound, user_inputs = _inputs(program, _named_by_memory(state, plain if model is whole else state | plain))
    _refuse_read_state(gm, bound, calls.seen)
    if len(leaves) != len(user_inputs):
        raise CaptureError(
            f"the graph takes {len(user_inputs)} inputs where the call has {len(leaves)} leaves; "
            "torch.export rearranged the arguments. Pass them as plain tensors and containers.",
            reason="inputs rearranged",
        )
    tensors = [value for value in (*leaves, *(b.tensor for b in bound)) if isinstance(value, torch.Tensor)]
    inline_regions(gm, ambient_modes({tensor.device.type for tensor in tensors}))
    names = SymbolNames()
    contract = input_spec(gm, user_inputs, paths, leaves, tree.dumps(spec), names, program.range_constraints)
    written = written_placeholders(gm)
    inout = any(leaf.kind == "inout" for leaf in contract.leaves)
    # It writes into a tensor of the model, or into an argument beside such tensors.
    if any(item.placeholder in written or inout for item in bound):
        contract = replace(contract, constraints=(*contract.constraints, "apart"))
    return Capture(
        gm=gm,
        bound=tuple(bound),
        user_inputs=tuple(user_inputs),
        input_spec=contract,
        output_spec=_output_spec(program),
        example=tuple(leaves),
        names=names,
    )


def _refuse_unfinished(values: Sequence[Any]) -> None:
    if any(isinstance(value, (UninitializedParameter, UninitializedBuffer)) for value in values):
        raise CaptureError(
            "the model has parameters without sizes, as lazy modules have before their first call. Call the "
            "model once before it is compiled.",
            reason="uninitialized parameters",
        )
    if any(isinstance(value, torch.Tensor) and value.device.type == "meta" for value in values):
        raise CaptureError(
            "the model or an argument is on the meta device, which is no device to compile for. To compile "
            "without weights, build the model with 'stitchcache prewarm --fake', or inside "
            "torch._subclasses.FakeTensorMode() on the device that it will run on.",
            reason="meta device",
        )


def _refuse_new_buffers(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """torch.export pairs buffers before the call with those after it, and would write into wrong tensors."""
    for name in after:
        if name not in before:
            raise CaptureError(
                f"the forward registers the buffer {name!r} when it runs first, which torch.export captures "
                "wrongly. Register it when the model is built, or call the model once before it is compiled.",
                reason=f"buffer {name} registered by the forward",
            )


def _named_by_memory(
    state: Mapping[str, torch.Tensor], plain: Mapping[str, torch.Tensor]
) -> dict[object, BoundTensor]:
    """The model's tensors that plain attributes, lists or objects lead to, by their memory.

    For a copy of the model, all: what holds the model that it was copied from leads to them too.

    torch.export takes such a tensor for a constant. Copied into an artifact it would be another tensor than
    the model's: what one compiled model writes, no other would see, nor the model itself.
    """
    paths: dict[object, list[str]] = {}
    for path, tensor in plain.items():
        paths.setdefault(elements_of(tensor), []).append(path)
    paths.pop(None, None)
    found = {
        place: BoundTensor("", first, "attribute", plain[first], tuple(more))
        for place, (first, *more) in paths.items()
    }
    for name, tensor in state.items() if found else ():
        place = elements_of(tensor)
        if place in found and found[place].kind == "attribute":
            kind = "parameter" if isinstance(tensor, torch.nn.Parameter) else "buffer"
            found[place] = BoundTensor("", name, kind, tensor, tuple(paths[place]))
    return found


def _inputs(
    program: torch.export.ExportedProgram, named: Mapping[object, BoundTensor]
) -> tuple[list[BoundTensor], list[str]]:
    """Sort the placeholders into tensors that we bind and leaves that the user brings."""
    written = written_placeholders(program.graph_module) - _copied_first(program.graph)
    bound, user = [], []
    tensors: dict[str, torch.Tensor] = dict(program.state_dict) | dict(program.constants)
    for item in program.graph_signature.input_specs:
        name = getattr(item.arg, "name", "")
        if item.kind is InputKind.USER_INPUT:
            user.append(name)
        elif item.kind in _KINDS:
            found = BoundTensor(name, str(item.target), _KINDS[item.kind], tensors[str(item.target)])
            if found.kind == "constant" and (own := named.get(elements_of(found.tensor))) is not None:
                found = replace(own, placeholder=name)
            if found.kind == "constant":
                _check_constant(found, written)
            bound.append(found)
        else:
            raise CaptureError(
                f"the model uses {item.target or name!r}, which torch.export turns into an input of kind "
                f"{item.kind.name}; only parameters, buffers and constant tensors can be stored. "
                "Move it out of the forward, or make its op a splitting op.",
                reason=f"input of kind {item.kind.name}",
            )
    return bound, user


class _Calls(TorchFunctionMode):
    """Sees which of some tensors Python asks for their values, as ``int(x)``, ``if x`` and ``x.item()`` do.

    For parameters, buffers and arguments torch.export refuses that; other tensors have their data while it
    traces, so the answer is taken for a constant.

    With ``opens`` it traces into a library's ops that are made of torch's, as torchao's are: no key has what
    is in them, and between pieces they would run one by one.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], *, opens: bool) -> None:
        super().__init__()
        self._watched, self._opens = {id(tensor) for tensor in tensors}, opens
        self.seen: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, or what it is made of; note the tensor if it gives Python a value."""
        if args and id(args[0]) in self._watched and getattr(func, "__name__", "") in _VALUE_READS:
            self.seen.add(storage_id(args[0]))
        op = made_of_others(func) if self._opens else None
        if op is None:
            return func(*args, **(kwargs or {}))
        with self:
            return op.decompose(*args, **(kwargs or {}))


def _refuse_read_state(gm: GraphModule, bound: Sequence[BoundTensor], seen: set[int]) -> None:
    """Refuse a graph that writes into a tensor whose value decided how the graph looks."""
    written = written_placeholders(gm) if seen else set()
    for item in bound:
        if item.placeholder in written and storage_id(item.tensor) in seen:
            raise CaptureError(
                f"the forward writes into {item.name!r}, and Python asks for its value (int(), .item(), an "
                "index), which the capture would take for a constant. Pass a number that Python uses as an "
                "argument, or compute with the tensor itself.",
                reason=f"value of {item.name} read and written",
            )


def _copied_first(graph: torch.fx.Graph) -> set[str]:
    """Placeholders that only copies are made of: of the literals in ``torch.tensor(...)``.

    The copy's fake tensor has the memory of what it is a copy of, as if that was written.
    """
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    copies = torch.ops.aten.lift_fresh_copy.default
    return {node.name for node in placeholders if all(user.target is copies for user in node.users)}


def _check_constant(constant: BoundTensor, written: set[str]) -> None:
    """A constant goes into the artifact by value."""
    if constant.placeholder in written:
        raise CaptureError(
            f"the forward writes into {constant.name!r} (as torch.export names it), a tensor that no "
            "attribute of the model leads to: a global, or one that a function holds. Keep it in the model, "
            "as a buffer (register_buffer) or in an attribute, so that compiled models share it.",
            reason=f"write into constant {constant.name}",
        )
    if has_fakes([constant.tensor]):
        raise CaptureError(
            f"the forward uses {constant.name!r}, a tensor that is neither parameter nor buffer, and it was "
            "built without data. Make it a buffer (register_buffer), or build the model with data.",
            reason=f"constant {constant.name} without data",
        )


def _output_spec(program: torch.export.ExportedProgram) -> OutputSpec:
    results = program.graph_signature.output_specs
    # Of the versions we support, none leaves values to write back: the graph writes in place.
    other = next((item for item in results if item.kind is not OutputKind.USER_OUTPUT), None)
    if other is not None:
        raise CaptureError(
            f"the model returns a {other.kind.name}; return tensors and plain values instead.",
            reason=f"output of kind {other.kind.name}",
        )
    return OutputSpec(tree=tree.dumps(program.call_spec.out_spec), count=len(results))


def _capture_error(model: torch.nn.Module, error: BaseException, way_out: str) -> CaptureError:
    """Say in a few lines what torch says in a few hundred."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, IndexError) and frames and frames[-1].name.startswith("produce_guards"):
        return CaptureError(
            f"{type(model).__qualname__} gives an argument more dimensions (x.unsqueeze_(), x.resize_()), "
            "which torch.export cannot write down. Take x.unsqueeze(), and go on with its result.",
            reason="an argument's number of dimensions changes",
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # Of a broken promise about sizes, the lines after the first say which, and what to promise instead.
    about = [line for line in lines[1:] if line.startswith("- ") or re.fullmatch(r"\w+ = .*Dim.*", line)]
    reason = " ".join([lines[0], *about[:4]])
    location = _user_line(error)
    where = f" at {location}" if location else ""
    return CaptureError(
        f"{type(model).__qualname__} cannot be captured as one graph{where}: "
        f"{type(error).__name__}: {reason[:500].rstrip('.')}. {way_out}",
        reason=f"{type(error).__name__}: {reason}",
        location=location,
    )


def _user_line(error: BaseException) -> str:
    """The deepest frame that is neither torch's nor ours, nor the standard library's."""
    skipped = (str(Path(torch.__file__).parent), str(Path(__file__).parent.parent), "<")
    library = str(Path(traceback.__file__).parent)
    found = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(skipped)
        and (not frame.filename.startswith(library) or "site-packages" in frame.filename)
    ]
    if found and found[-1].name != "<module>":
        return f"{found[-1].filename}:{found[-1].lineno}"
    before = error.__cause__ or error.__context__
    return _user_line(before) if before is not None else ""


def _separate(leaves: Sequence[Any], state: Sequence[torch.Tensor]) -> list[Any]:
    """Copy tensors among leaves that share memory with an earlier leaf or with the model.

    The exporter takes two arguments that are one tensor for one input, and the graph would compute
    with the wrong one as soon as a call brings two.
    """
    seen = {storage_id(tensor) for tensor in state if tensor.layout == torch.strided}
    separated: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
            if storage_id(leaf) in seen:
                leaf = leaf.clone() if has_fakes([leaf]) else clone_all([leaf.detach()])[0]
            seen.add(storage_id(leaf))
        separated.append(leaf)
    return separated
