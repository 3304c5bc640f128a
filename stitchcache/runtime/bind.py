"""Find a model's tensors by name, and make sure that they are what was compiled for."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from stitchcache.errors import BindError
from stitchcache.state import memory_of, state_of, tensor_at
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
        if binding.kind == "attribute":
            tensor = tensor_at(model, binding.name)
        else:
            tensor = (constants if binding.kind == "constant" else state).get(binding.name)
        if tensor is None:
            raise BindError(
                f"the model has no {binding.kind} {binding.name!r}, which the artifact uses. "
                "Load it with the model that it was compiled from, or compile this one.",
                name=binding.name,
                expected=binding.kind,
                actual="nothing",
            )
        for alias in binding.aliases:
            other = state.get(alias)
            if other is None:
                other = tensor_at(model, alias)
            # Another object over the same memory is the same to whoever reads or writes it.
            if other is not tensor and (other is None or memory_of(other) != memory_of(tensor)):
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
