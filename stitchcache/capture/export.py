"""Capture a model with ``torch.export`` (non-strict), and say what the capture promises.

The exported graph takes parameters, buffers and lifted constants as placeholders before the user's
inputs, and mutates buffers in place, so that whoever runs it on the model's own tensors sees the
model's own side effects. Tried with torch 2.11 and 2.13.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.export.graph_signature import InputKind, OutputKind

from stitchcache.capture.contract import input_spec
from stitchcache.capture.edges import Observed, Subject, settle_lower_bounds
from stitchcache.capture.example import attributes_kept, separate
from stitchcache.capture.regions import ambient_modes, settle_regions
from stitchcache.capture.unweighted import names_of
from stitchcache.errors import CaptureError
from stitchcache.graph.symbols import SymbolNames
from stitchcache.torchside import tree
from stitchcache.torchside.tensors import has_fakes
from stitchcache.types import InputSpec, OutputSpec

# What torch.export and the user's own forward may raise while it is traced.
_EXPORT_ERRORS = (
    RuntimeError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    AssertionError,
    ArithmeticError,
    NameError,
    ImportError,
)


@dataclass(frozen=True, slots=True)
class BoundTensor:
    """A placeholder that is fed from the model, or from the artifact itself.

    Args:
        placeholder: The placeholder's name in the graph.
        name: Qualified name in the model; for a constant, torch's name for it.
        kind: ``parameter``, ``buffer`` or ``constant``.
        tensor: The tensor itself.
    """

    placeholder: str
    name: str
    kind: str
    tensor: torch.Tensor


@dataclass(frozen=True, slots=True)
class Capture:
    """A model as one graph, and the contract that goes with it.

    Args:
        gm: Flat graph: bound tensors first, then one placeholder a leaf of the inputs.
        bound: Tensors for the first placeholders, in order.
        user_inputs: Names of the remaining placeholders, one a leaf.
        input_spec: What a call must bring.
        output_spec: How results are returned.
        example: The leaves that it was captured with, one for each of ``user_inputs``.
        settle: Tries the sizes below what torch assumed; see :func:`settled`.
    """

    gm: torch.fx.GraphModule
    bound: tuple[BoundTensor, ...]
    user_inputs: tuple[str, ...]
    input_spec: InputSpec
    output_spec: OutputSpec
    example: tuple[Any, ...] = ()
    settle: Callable[[], InputSpec] | None = None


def capture(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any = None,
) -> Capture:
    """Trace a model into one graph.

    Args:
        model: In evaluation mode.
        args: Example positional arguments, any pytree.
        kwargs: Example keyword arguments.
        dynamic_shapes: As for ``torch.export.export``.

    Returns:
        The graph and its contract.

    Raises:
        CaptureError: torch cannot export it; ``location`` is the user's line that stopped it.
    """
    leaves, spec = tree.flatten((args, dict(kwargs)))
    _refuse_meta([*model.parameters(), *model.buffers(), *leaves])
    leaves = separate(leaves, model)
    example: tuple[tuple[Any, ...], dict[str, Any]] = tree.unflatten(leaves, spec)
    try:
        with torch.no_grad(), attributes_kept(model):
            program = torch.export.export(
                model, example[0], example[1], dynamic_shapes=dynamic_shapes, strict=False
            )
    except _EXPORT_ERRORS as error:
        if isinstance(error, CaptureError):
            raise
        raise _capture_error(model, error) from error
    bound, user_inputs = _inputs(program)
    paths = tree.leaf_paths(model.forward, args, dict(kwargs))
    if len(leaves) != len(user_inputs):
        raise CaptureError(
            f"the graph takes {len(user_inputs)} inputs where the call has {len(leaves)} leaves; "
            "torch.export rearranged the arguments. Pass them as plain tensors and containers.",
            reason="inputs rearranged",
        )
    gm = program.graph_module
    settle_regions(gm, ambient_modes({leaf.device.type for leaf in _tensors(leaves, bound)}))
    names = SymbolNames()
    contract = input_spec(program, user_inputs, paths, leaves, tree.dumps(spec), dynamic_shapes, names)
    outputs = _output_spec(program, user_inputs)

    def call(
        values: Sequence[Any], state: Mapping[str, torch.Tensor]
    ) -> tuple[list[Any], dict[str, torch.Tensor]]:
        positional, named = tree.unflatten(values, spec)
        given = {f"model.{name}": tensor for name, tensor in state.items()}
        result, after = torch.func.functional_call(Observed(model), given, positional, named)
        return tree.flatten(result)[0], after

    def again(
        values: Sequence[Any],
    ) -> tuple[torch.fx.GraphModule, dict[str, tuple[str, torch.Tensor]], Sequence[str]]:
        positional, named = tree.unflatten(values, spec)
        with torch.inference_mode(False):
            fixed = capture(model, positional, named)
        return fixed.gm, names_of(fixed.bound), fixed.user_inputs

    subject = Subject(
        gm=gm,
        bound={item.placeholder: item.tensor for item in bound},
        buffers={item.placeholder: item.name for item in bound if item.kind != "constant"},
        leaves=dict(zip(user_inputs, leaves, strict=True)),
        call=call,
        mutations=len(outputs.mutations),
        again=again,
        names={item.placeholder: item.name for item in bound},
    )
    return Capture(
        gm=gm,
        bound=tuple(bound),
        user_inputs=tuple(user_inputs),
        input_spec=contract,
        output_spec=outputs,
        example=tuple(leaves),
        settle=lambda: settle_lower_bounds(contract, subject, names, type(model).__qualname__),
    )


def settled(captured: Capture) -> Capture:
    """A capture whose contract allows only sizes at which its graph was shown right.

    Apart from :func:`capture`, because it runs graph and model, which is no part of what was captured.
    """
    if captured.settle is None:
        return captured
    return replace(captured, input_spec=captured.settle(), settle=None)


def _refuse_meta(values: Sequence[Any]) -> None:
    if any(isinstance(value, torch.Tensor) and value.device.type == "meta" for value in values):
        raise CaptureError(
            "the model or an argument is on the meta device, which is no device to compile for. To compile "
            "without weights, build the model with 'stitchcache prewarm --fake', or inside "
            "torch._subclasses.FakeTensorMode() on the device that it will run on.",
            reason="meta device",
        )


def _tensors(leaves: Sequence[Any], bound: Sequence[BoundTensor]) -> list[torch.Tensor]:
    return [*(leaf for leaf in leaves if isinstance(leaf, torch.Tensor)), *(item.tensor for item in bound)]


def _inputs(program: torch.export.ExportedProgram) -> tuple[list[BoundTensor], list[str]]:
    """Sort the placeholders into tensors that we bind and leaves that the user brings."""
    bound, user = [], []
    state: dict[str, torch.Tensor] = dict(program.state_dict) | dict(program.constants)
    for item in program.graph_signature.input_specs:
        name = getattr(item.arg, "name", "")
        if item.kind is InputKind.USER_INPUT:
            user.append(name)
        elif item.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            kind = {InputKind.PARAMETER: "parameter", InputKind.BUFFER: "buffer"}.get(item.kind, "constant")
            bound.append(BoundTensor(name, str(item.target), kind, state[str(item.target)]))
            if kind == "constant":
                _check_has_data(bound[-1])
        else:
            raise CaptureError(
                f"the model uses {item.target or name!r}, which torch.export lifts as {item.kind.name}; "
                "only parameters, buffers and constant tensors can be stored. "
                "Move it out of the forward, or make its op a splitting op.",
                reason=f"input of kind {item.kind.name}",
            )
    return bound, user


def _check_has_data(constant: BoundTensor) -> None:
    """A constant goes into the artifact by value."""
    if has_fakes([constant.tensor]):
        raise CaptureError(
            f"the forward uses {constant.name!r}, a tensor that is neither parameter nor buffer, and it was "
            "built without data. Make it a buffer (register_buffer), or build the model with data.",
            reason=f"constant {constant.name} without data",
        )


def _output_spec(program: torch.export.ExportedProgram, user_inputs: Sequence[str]) -> OutputSpec:
    """What the graph's results are: values to write back first, then the user's leaves."""
    mutations, count = [], 0
    for item in program.graph_signature.output_specs:
        if item.kind is OutputKind.USER_OUTPUT:
            count += 1
        elif item.kind is OutputKind.BUFFER_MUTATION:
            mutations.append(f"buffer:{item.target}")
        elif item.kind is OutputKind.USER_INPUT_MUTATION:
            mutations.append(f"input:{list(user_inputs).index(str(item.target))}")
        else:
            raise CaptureError(
                f"the model returns a {item.kind.name}; return tensors and plain values instead.",
                reason=f"output of kind {item.kind.name}",
            )
    spec = program.call_spec.out_spec
    return OutputSpec(tree=tree.dumps(spec), count=count, mutations=tuple(mutations))


def _capture_error(model: torch.nn.Module, error: BaseException) -> CaptureError:
    """Say in a few lines what torch says in a few hundred."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # Of a broken promise about sizes, the lines after the first say which, and what to promise instead.
    about = [line for line in lines[1:] if line.startswith("- ") or re.fullmatch(r"\w+ = .*Dim.*", line)]
    reason = " ".join([lines[0], *about[:4]])
    location = _user_line(error)
    where = f" at {location}" if location else ""
    return CaptureError(
        f"{type(model).__qualname__} cannot be captured as one graph{where}: "
        f"{type(error).__name__}: {reason[:500]}. "
        "torch.export must be able to trace the forward: replace Python branches on tensor values "
        "with torch.where or torch.cond, keep sizes that vary in dynamic_shapes, and see the cause "
        "below for torch's whole explanation.",
        reason=f"{type(error).__name__}: {reason}",
        location=location,
    )


def _user_line(error: BaseException) -> str:
    """The deepest frame that is neither torch's nor ours."""
    skipped = (str(Path(torch.__file__).parent), str(Path(__file__).parent.parent))
    chain: BaseException | None = error
    while chain is not None:
        for frame in reversed(traceback.extract_tb(chain.__traceback__)):
            if not frame.filename.startswith((*skipped, "<")):
                if frame.name != "<module>":
                    return f"{frame.filename}:{frame.lineno}"
                break
        chain = chain.__cause__ or chain.__context__
    return ""
