"""Find a model's tensors by name, and make sure that they are what was compiled for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from stitchcache.errors import BindError
from stitchcache.types import BindingSpec


def bind_tensors(
    bindings: tuple[BindingSpec, ...], model: torch.nn.Module, constants: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Look up the tensors that stitching code uses.

    Args:
        bindings: What is needed.
        model: Whose parameters and buffers to use; by reference.
        constants: Tensors that the artifact itself carries.

    Returns:
        Binding name to tensor.

    Raises:
        BindError: One is missing, or differs in shape, strides, dtype or device type.
    """
    state = state_of(model)
    dtypes: dict[str, object] = {}
    found: dict[str, torch.Tensor] = {}
    for binding in bindings:
        source = constants if binding.kind == "constant" else state
        tensor = source.get(binding.name)
        if tensor is None:
            raise BindError(
                f"the model has no {binding.kind} {binding.name!r}, which the artifact uses. "
                "Load it with the model that it was compiled from, or compile this one.",
                name=binding.name,
                expected=binding.kind,
                actual="nothing",
            )
        for alias in binding.aliases:
            if state.get(alias) is not tensor:
                raise BindError(
                    f"{alias!r} and {binding.name!r} were one tensor when the artifact was compiled and are "
                    "two now. Tie them again, or compile this model.",
                    name=alias,
                    expected=f"the same tensor as {binding.name}",
                    actual="another tensor",
                )
        spec = binding.tensor
        if spec.dtype not in dtypes:
            dtypes[spec.dtype] = getattr(torch, spec.dtype, None)
        # Nearly always all is as it was; what is not, and whether it matters, is found out apart.
        if (
            tensor.shape != spec.shape
            or tensor.dtype is not dtypes[spec.dtype]
            or tensor.device.type != spec.device
            or tensor.stride() != spec.stride
        ):
            _check(binding, tensor)
        found[binding.name] = tensor
    return found


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by each of its names.

    As ``named_parameters`` and ``named_buffers`` without removal of duplicates, whose nested generators
    take a millisecond for a deep model.
    """
    state: dict[str, torch.Tensor] = {}
    for prefix, module in modules_of(model):
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    state[prefix + name] = tensor
    return state


def modules_of(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """A model's modules in their order, by each of their names, which end in a dot; the model's is empty."""
    todo: list[tuple[str, torch.nn.Module]] = [("", model)]
    while todo:
        prefix, module = todo.pop()
        yield prefix, module
        children = [
            (f"{prefix}{name}.", child) for name, child in module._modules.items() if child is not None
        ]
        # Reversed, so that what comes first is taken first.
        todo += reversed(children)


def _check(binding: BindingSpec, tensor: torch.Tensor) -> None:
    spec = binding.tensor
    strides = [
        (s, w) for size, s, w in zip(tensor.shape, tensor.stride(), spec.stride, strict=False) if size > 1
    ]
    facts = (
        ("shape", spec.shape, tuple(tensor.shape)),
        ("dtype", spec.dtype, str(tensor.dtype).removeprefix("torch.")),
        ("device", spec.device, tensor.device.type),
        ("strides", [w for _, w in strides], [s for s, _ in strides]),
    )
    for fact, wanted, actual in facts:
        if wanted != actual:
            raise BindError(
                f"{binding.kind} {binding.name!r} has {fact} {actual}, the artifact needs {wanted}. "
                "Load it with the model that it was compiled from, or compile this one.",
                name=binding.name,
                expected=f"{fact} {wanted}",
                actual=str(actual),
            )
