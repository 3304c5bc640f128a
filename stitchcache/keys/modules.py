"""What a torch module is made of, for keys: which of its attributes count, and how it is written."""

from __future__ import annotations

from typing import Any

import torch

from stitchcache.keys.tensors import is_fake, is_plain_tensor, tensor_text
from stitchcache.keys.values import Encoder
from stitchcache.torchside.modules import HOOKS, INTERNALS
from stitchcache.torchside.tensors import FAKE_INTERNALS

HF_NOTES = frozenset(
    {
        "_is_hf_initialized",
        "name_or_path",
        "_name_or_path",
        "_commit_hash",
        "transformers_version",
        "_original_object_hash",
        "__validators__",
        "__class_validators__",
    }
)
"""What transformers keeps for itself: where a model came from, a hash that moves with the seed, and checks
that run when a field of a configuration is set."""

TENSOR_NOTES = frozenset({"_is_hf_initialized"})
"""What it leaves on any module and tensor."""


def own_attributes(value: torch.Tensor) -> dict[str, Any]:
    """What somebody noted on a tensor, as far as it counts: the same on a fake as on the real one."""
    fake = is_fake(value)
    return {
        name: noted
        for name, noted in value.__dict__.items()
        if name not in TENSOR_NOTES and not (fake and (name in FAKE_INTERNALS or "_memo" in name))
    }


def ignored_names(cls: type) -> frozenset[str]:
    """Attributes of a class or its instances that say where they came from, not what they compute."""
    if any((base.__module__ or "").partition(".")[0] == "transformers" for base in cls.__mro__):
        return HF_NOTES
    return TENSOR_NOTES


def tensor_line(encoder: Encoder, name: str, value: torch.Tensor | None) -> str:
    """A parameter or buffer in one line.

    Raises:
        UnkeyableError: It is a tensor subclass or not materialised: metadata does not stand for it.
    """
    if value is None:
        return "None"
    if value.is_quantized or (not is_plain_tensor(value) and not is_fake(value)):
        raise encoder.error(f"{name} is a {type(value).__name__}, whose metadata does not stand for it")
    return f"{tensor_text(value)} {value.requires_grad}"


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether a call of the module runs hooks."""
    state = module.__dict__
    return any(map(state.get, HOOKS))


def put_hooks(encoder: Encoder, module: torch.nn.Module) -> None:
    """Write a module's hooks in the order in which they run; their ids are the process's own."""
    state = module.__dict__
    for name, flags in HOOKS.items():
        for index, (key, hook) in enumerate((state.get(name) or {}).items()):
            encoder.text(name)
            encoder.put_at(f".{name}[{index}]", hook)
            for flag in flags:
                encoder.put(key in state.get(flag, ()))


def put_module(encoder: Encoder, module: torch.nn.Module) -> None:
    """Write a module that is a value: held in a list or a closure, out of the model's own tree.

    Its parameters and buffers become constants of the artifact, so they are written by value.
    """
    if encoder.again(module):
        return
    encoder.out += b"m"
    encoder.put_class(type(module))
    state = module.__dict__
    encoder.put(bool(module.training))
    for kind in ("_parameters", "_buffers", "_modules"):
        encoder.put_at(f".{kind}", dict(state.get(kind, {})))
    put_hooks(encoder, module)
    encoder.put_state(module, INTERNALS | ignored_names(type(module)))
