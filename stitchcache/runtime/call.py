"""The function behind a compiled model: written out, compiled, and bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch

from stitchcache.codegen.execution import CodeObjects, show_source
from stitchcache.errors import EntryFormatError, InputMismatchError
from stitchcache.runtime.callcode import CallSource, output_expression, write_checks, write_inputs
from stitchcache.runtime.mismatch import Arrangement, explain_mismatch, is_plain, share_memory
from stitchcache.torchside import tree
from stitchcache.torchside.state import set_grad_enabled
from stitchcache.types import Artifact, OutputSpec


def build_call(
    function: Callable[..., Any],
    artifact: Artifact,
    tensors: Mapping[str, torch.Tensor],
    forward: Callable[..., Any],
    objects: CodeObjects,
) -> Callable[..., Any]:
    """Write and compile the code around a stitching function.

    Args:
        function: Takes the leaves that are tensors or symbols; returns flat results.
        artifact: Has the contract.
        tensors: Bound tensors by name, for buffers that are written back.
        forward: The model's own, for the order of its parameters.
        objects: Code objects that are kept, and are to be kept.

    Returns:
        The function behind :class:`CompiledModel`.

    Raises:
        EntryFormatError: The contract cannot be what a capture wrote.
    """
    inputs, outputs = artifact.input_spec, artifact.output_spec
    if inputs is None or outputs is None:
        raise EntryFormatError("the entry has no input or output specification.", field="input_spec")
    for symbol in inputs.symbols:
        number = symbol.name.removeprefix("s")
        if number == symbol.name or not (number.isascii() and number.isdecimal()):
            raise EntryFormatError(
                f"symbol {symbol.name!r} is not a canonical name.", field="input_spec.symbols"
            )
    wanted = {leaf.tensor.dtype for leaf in inputs.leaves if leaf.tensor is not None}
    dtypes = {name: value for name in wanted if isinstance(value := getattr(torch, name, None), torch.dtype)}
    source = CallSource(symbols=frozenset(symbol.name for symbol in inputs.symbols))
    layout = Arrangement(inputs, forward, tensors)
    leaves = write_inputs(source, inputs, dtypes, layout.collected())
    if leaves is None:
        leaves = [source.fresh() for _ in inputs.leaves]
        source.lines.append("leaves = take_apart(args, kwargs)")
        if leaves:
            source.lines.append(f"{', '.join(leaves)}, = leaves")
        write_checks(source, inputs, leaves, dtypes)
    taken = [name for name, leaf in zip(leaves, inputs.leaves, strict=True) if leaf.kind != "constant"]
    _write_body(source, taken, outputs, leaves, tensors)
    source.names.update(
        Tensor=torch.Tensor,
        Parameter=torch.nn.Parameter,
        is_plain=is_plain,
        meets_state=layout.meets_state,
        function=function,
        refuse=None,
        take_apart=layout.take_apart,
        same_strides=same_strides,
        share_memory=share_memory,
        grad_enabled=torch.is_grad_enabled,
        set_grad_enabled=set_grad_enabled,
        autocast_enabled=torch.is_autocast_enabled,
        run_quietly=run_quietly,
        unflatten=_unflattener(outputs),
    )
    return _compile(source, layout, artifact.graph_hash, objects)


def _write_body(
    source: CallSource,
    taken: list[str],
    outputs: OutputSpec,
    leaves: list[str],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Call the stitching function, write mutations back, build the result."""
    arguments = ", ".join(taken)
    device = source.constant(next((t.device.type for t in tensors.values()), "cpu"))
    source.lines += [
        f"if autocast_enabled({device}):",
        f"    results = run_quietly(function, {device}, ({arguments}{',' if taken else ''}))",
        "elif grad_enabled():",
        "    set_grad_enabled(False)",
        f"    try: results = function({arguments})",
        "    finally: set_grad_enabled(True)",
        f"else: results = function({arguments})",
    ]
    names = [source.fresh() for _ in range(len(outputs.mutations) + outputs.count)]
    expression = output_expression(source, outputs, names[len(outputs.mutations) :])
    if outputs.mutations or expression is not None:
        source.lines.append(f"{', '.join(names)}, = results" if names else "results")
    for name, mutation in zip(names, outputs.mutations, strict=False):
        kind, _, where = mutation.partition(":")
        target = leaves[int(where)] if kind == "input" else source.constant(tensors[where])
        source.lines.append(f"{target}.detach().copy_({name})")
    source.lines.append(
        f"return {expression}"
        if expression is not None
        else f"return unflatten(results[{len(outputs.mutations)}:])"
    )


def _unflattener(outputs: OutputSpec) -> Callable[[Sequence[Any]], Any]:
    """Rebuild containers that need torch's registry; looked up at the first call that needs them."""
    spec = None

    def unflatten(results: Sequence[Any]) -> Any:
        nonlocal spec
        if spec is None:
            spec = tree.loads(outputs.tree)
        return tree.unflatten(list(results), spec)

    return unflatten


def same_strides(tensor: torch.Tensor, wanted: tuple[int, ...]) -> bool:
    """Compare strides where they matter: a dimension of one element has none."""
    return tensor.numel() == 0 or all(
        size == 1 or stride == want
        for size, stride, want in zip(tensor.shape, tensor.stride(), wanted, strict=True)
    )


def run_quietly(function: Callable[..., Any], device: str, arguments: tuple[Any, ...]) -> Any:
    """Call a function without autograd and autocast."""
    with torch.no_grad(), torch.autocast(device, enabled=False):
        return function(*arguments)


def _compile(
    source: CallSource, layout: Arrangement, graph_hash: str, objects: CodeObjects
) -> Callable[..., Any]:
    body = "\n".join(f"        {line}" for line in source.lines)
    parameters = ", ".join(source.names)
    text = f"def bind({parameters}):\n    def call(*args, **kwargs):\n{body}\n    return call\n"
    filename = f"<stitchcache call {graph_hash[:12]}>"
    namespace: dict[str, Any] = {}
    code = objects.get(filename, text)
    if code is None:
        code = compile(text, filename, "exec", dont_inherit=True)
        objects.add(filename, text, code)
    exec(code, namespace)  # noqa: S102 - written above, from checked parts

    def refuse(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arranged = layout.arrange(args, kwargs)
        leaves = layout.take_apart(*arranged)
        error = explain_mismatch(layout.spec, leaves) or layout.meeting(leaves)
        if error is not None:
            raise error
        if len(arranged[0]) == len(args) and arranged[1].keys() == kwargs.keys():
            raise InputMismatchError(
                "the arguments do not fit the capture.", argument="", expected="", actual=""
            )
        return call(*arranged[0], **arranged[1])

    source.names["refuse"] = refuse
    call: FunctionType = namespace["bind"](**source.names)
    show_source(call, filename, text)
    return call
