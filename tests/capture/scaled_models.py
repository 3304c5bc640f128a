"""Weights as torchao quantizes them: tensors made of others, in one another, with facts beside them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


class Packed(torch.Tensor):
    """Two numbers of four bits in one byte."""

    @staticmethod
    def __new__(cls, pairs: Tensor) -> Packed:
        shape = (*pairs.shape[:-1], 2 * pairs.shape[-1])
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.int8)

    def __init__(self, pairs: Tensor) -> None:
        self.pairs = pairs

    def __tensor_flatten__(self):
        return ["pairs"], None

    @classmethod
    def __tensor_unflatten__(cls, parts, context, size, strides):
        return cls(parts["pairs"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].pairs)
        raise NotImplementedError(func)


def _unpacked(value):
    return torch.stack([value.pairs & 15, value.pairs >> 4], -1).flatten(-2).to(torch.int8)


class Scaled(torch.Tensor):
    """Packed numbers, a scale a row, and what was added to them."""

    @staticmethod
    def __new__(cls, packed: Packed, scale: Tensor, offset: int) -> Scaled:
        return torch.Tensor._make_wrapper_subclass(cls, packed.shape, dtype=torch.float32)

    def __init__(self, packed: Packed, scale: Tensor, offset: int) -> None:
        self.packed, self.scale, self.offset = packed, scale, offset

    def __tensor_flatten__(self):
        return ["packed", "scale"], {"offset": self.offset}

    @classmethod
    def __tensor_unflatten__(cls, parts, context, size, strides):
        return cls(parts["packed"], parts["scale"], context["offset"])

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            return func(*map(_whole, args), **{name: _whole(value) for name, value in (kwargs or {}).items()})
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].packed, args[0].scale, args[0].offset)
        return func(*tree_map(_whole, args), **(kwargs or {}))


_LIBRARY = torch.library.Library("stitchcache_scaled", "DEF")
_LIBRARY.define("restore(Tensor numbers, Tensor scale, int offset) -> Tensor")
_LIBRARY.impl(
    "restore",
    lambda numbers, scale, offset: (numbers.to(torch.float32) - offset) * scale[:, None],
    "CompositeImplicitAutograd",
)


def _whole(value):
    if not isinstance(value, Scaled):
        return value
    # An op of its own, as torchao's are.
    return torch.ops.stitchcache_scaled.restore(_unpacked(value.packed), value.scale, value.offset)


def weight(rows: int, columns: int, offset: int, seed: int = 0) -> nn.Parameter:
    made = torch.Generator().manual_seed(seed)
    pairs = torch.randint(0, 256, (rows, columns // 2), generator=made, dtype=torch.uint8)
    return nn.Parameter(Scaled(Packed(pairs), torch.rand(rows, generator=made), offset), requires_grad=False)


class Tied(nn.Module):
    """Two layers with one weight, and one with a plain one."""

    def __init__(self, offset: int) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.first.weight = self.second.weight = weight(8, 8, offset)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


def model(offset: int = 7) -> Tied:
    torch.manual_seed(0)
    return Tied(offset).eval()
