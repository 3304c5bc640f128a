"""Run a model and its compiled form side by side, and insist that nobody could tell them apart."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree

import stitchcache


def clone_tree(value: Any) -> Any:
    """A deep copy that keeps strides."""
    return pytree.tree_map_only(torch.Tensor, _clone, value)


def _clone(tensor: torch.Tensor) -> torch.Tensor:
    copied = tensor.detach().clone()
    if 0 in tensor.stride():
        return copied[tuple(slice(0, 1 if s == 0 else None) for s in tensor.stride())].expand(tensor.shape)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(copied)


def same(want: Any, got: Any, where: str, tolerance: float = 0.0) -> None:
    """Compare two results: containers, types, dtypes, shapes and numbers."""
    wanted, want_spec = pytree.tree_flatten(want)
    given, got_spec = pytree.tree_flatten(got)
    assert want_spec == got_spec, f"{where}: {want_spec} came back as {got_spec}"
    for index, (a, b) in enumerate(zip(wanted, given, strict=True)):
        if not isinstance(a, torch.Tensor):
            assert type(a) is type(b), f"{where}[{index}]: {a!r} against {b!r}"
            assert a == b or (a != a and b != b), f"{where}[{index}]: {a!r} against {b!r}"
            continue
        assert isinstance(b, torch.Tensor), f"{where}[{index}]: a tensor became {b!r}"
        assert a.dtype == b.dtype, f"{where}[{index}]: {a.dtype} became {b.dtype}"
        assert a.shape == b.shape, f"{where}[{index}]: {tuple(a.shape)} became {tuple(b.shape)}"
        assert numbers_agree(a, b, tolerance), f"{where}[{index}]: numbers differ: {a} against {b}"


def numbers_agree(want: torch.Tensor, got: torch.Tensor, tolerance: float = 0.0) -> bool:
    """Whether two tensors of one dtype and shape hold the same numbers; NaN only where the other has it.

    Without a tolerance, floats may differ in their last bits, as an op does that runs on a view.
    """
    if not (want.is_floating_point() or want.is_complex()):
        return torch.equal(want, got)
    wide = torch.complex128 if want.is_complex() else torch.float64
    allowed = max(tolerance, 4 * torch.finfo(want.dtype).eps) if tolerance else 1e-6
    return torch.allclose(want.to(wide), got.to(wide), rtol=allowed, atol=allowed, equal_nan=True)


def agree(
    model: torch.nn.Module,
    calls: Sequence[tuple[Any, ...]],
    directory: Path,
    *,
    kwargs: Sequence[dict[str, Any]] | None = None,
    tolerance: float = 0.0,
    seed: int | None = None,
    reload: bool = True,
    **options: Any,
) -> stitchcache.CompiledModel:
    """Compile a model with the first call, then compare every call, twice, with eager execution.

    Outputs, what became of the arguments, and the state of the model are compared, with a freshly
    compiled callable and (``reload``) with one that a second lookup takes from the cache.
    """
    kwargs = kwargs or [{} for _ in calls]
    cache = stitchcache.Cache(directory)
    model = model.eval()
    compiled = None
    for turn in range(2 if reload else 1):
        reference, subject = copy.deepcopy(model), copy.deepcopy(model)
        before = clone_tree(dict(subject.state_dict()))
        compiled = stitchcache.compile(
            subject, clone_tree(calls[0]), clone_tree(kwargs[0]), cache=cache, **options
        )
        same(before, dict(subject.state_dict()), "state after compiling")
        assert turn == 0 or compiled.cache_hit is not None, "the second lookup missed"
        for number, (args, named) in enumerate(zip([*calls, *calls], [*kwargs, *kwargs], strict=True)):
            ours, theirs = clone_tree((args, named)), clone_tree((args, named))
            if seed is not None:
                torch.manual_seed(seed)
            with torch.no_grad():
                want = reference(*theirs[0], **theirs[1])
            if seed is not None:
                torch.manual_seed(seed)
            got = compiled(*ours[0], **ours[1])
            same(want, got, f"turn {turn}, call {number}", tolerance)
            same(theirs, ours, f"turn {turn}, arguments after call {number}", tolerance)
            same(
                dict(reference.named_buffers()),
                dict(subject.named_buffers()),
                f"turn {turn}, buffers after call {number}",
                tolerance,
            )
    return compiled


def model_of(forward: Any, **attributes: Any) -> torch.nn.Module:
    """A module with a forward and attributes; tensors that are no parameters become buffers."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in attributes.items():
                if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
                    self.register_buffer(name, value)
                else:
                    setattr(self, name, value)

    Model.forward = forward
    return Model()
