"""What to do about a model that ``torch.export`` refuses, by what stopped it."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_OTHERWISE = (
    "See the cause below for torch's whole explanation. A model that torch.export cannot take may run under "
    'torch.compile(model, backend="stitchcache").'
)
_BY_WORDS = (
    (
        r"GuardOnDataDependent|data-dependent",
        "Python decides by a tensor's value there, which a trace does not know: use torch.where or "
        'torch.cond, or torch.compile(model, backend="stitchcache"), which breaks the graph there.',
    ),
    (
        r"cast NotImplemented",
        "An op gets a tensor that is made of others, whose class knows it in __torch_dispatch__ only. Its "
        "__torch_function__ has to know it, as torchao's does for linear layers. Leave that parameter as "
        "it was (filter_fn= of torchao's quantize_).",
    ),
    (
        r"quantized|PackedParams|qint8|quint8|AffineQuantized",
        "Quantized tensors and modules of torch.ao are out of scope. Quantize the model with torchao "
        "(torchao.quantization.quantize_), whose weights can be compiled.",
    ),
)


def advice(
    model: torch.nn.Module, args: Any, kwargs: Mapping[str, Any], shapes: Any, error: BaseException
) -> str:
    """The way out in a few sentences, which end the message of a ``CaptureError``."""
    said = f"{type(error).__name__}: {error}"
    forward = model.forward
    try:
        inspect.signature(forward).bind(*args, **kwargs)
    except TypeError:
        return f"args and kwargs must be those of a call: forward{_signature(forward)}."
    except ValueError:
        pass  # A forward of C's has no signature.
    # The last is how torch 2.11 says it, without the class's module.
    refused = re.search(r"(?:Found|input type) <class '([^']+)'>|unhashable type: '(\w+)'", said)
    if refused is not None:
        return _about_type(refused[1] or refused[2])
    if shapes is not None and _is_about_shapes(said, error):
        return _about_shapes(forward)
    return next((what for words, what in _BY_WORDS if re.search(words, said)), _OTHERWISE)


def _about_type(name: str) -> str:
    """Advice for an object of a class that torch does not take apart."""
    if name.startswith("transformers.") and "Cache" in name:
        return (
            "A cache of transformers is neither a tensor nor a plain container: pass "
            "kwargs={'use_cache': False}, as docs/examples/llama.py does, and the results are plain."
        )
    short = name.rpartition(".")[2]
    return (
        "Arguments and results must be tensors, plain values, or lists, tuples and dicts of these. Register "
        f"a dataclass where it is defined: torch.export.register_dataclass({short}, "
        f"serialized_type_name={name!r}); "
        "another class with torch.utils._pytree.register_pytree_node and a serialized_type_name."
    )


def _is_about_shapes(said: str, error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    # The second file is where a dimension that the tensor does not have is an IndexError.
    inside = any(Path(frame.filename).match("torch/export/dynamic_shapes.py") for frame in frames)
    inside = inside or Path(frames[-1].filename).match("torch/_export/non_strict_utils.py")
    return inside or re.search("ConstraintViolation|Constraints violated|not in range", said) is not None


def _about_shapes(forward: Any) -> str:
    parameters = inspect.signature(forward).parameters.values()
    collected = [p.name for p in parameters if p.kind is p.VAR_KEYWORD]
    more = ""
    if collected:
        more = f" torch.export takes no shapes for what **{collected[0]} collects: name those arguments."
    return (
        "dynamic_shapes does not fit: give one item for each argument of the example, in order or by name "
        f"(forward{_signature(forward)}): a dict such as {{0: Dim('batch', 1, 64)}}, whose keys are "
        "dimensions that the tensor has and whose ranges hold the example's sizes, or None where all sizes "
        f"are static. Leave out a size that the model fixes; an example's size of 0 or 1 is fixed too.{more}"
    )


def _signature(forward: Any) -> str:
    names = [
        str(p).partition(":")[0].partition("=")[0].strip()
        for p in inspect.signature(forward).parameters.values()
    ]
    return f"({', '.join(names)})"
