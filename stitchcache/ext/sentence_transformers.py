"""Sentence encoders over a compiled transformer (``pip install 'stitchcache[sentence-transformers]'``)."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

import stitchcache
from stitchcache.errors import OptionError, check_kind
from stitchcache.options import Dim

ATTENTION = "aten::scaled_dot_product_attention"


def compile_encoder(
    model: SentenceTransformer,
    *,
    batch: int = 256,
    tokens: int | None = None,
    splitting_ops: Sequence[str] = (ATTENTION,),
    **options: Any,
) -> SentenceTransformer:
    """Compile a sentence encoder's transformer, or load it, for ``encode``.

    ``encode`` stays sentence-transformers': it sorts, batches, pools and normalizes. The transformer is
    compiled for any number of sentences and tokens up to the limits. What comes after it runs eagerly.

    Args:
        model: Its first module is a transformer over token ids. It is not changed; its weights are shared.
        batch: Most sentences of a batch: at least ``encode``'s ``batch_size``.
        tokens: Most tokens of a sentence; ``None`` takes the model's ``max_seq_length``.
        splitting_ops: Ops to split at; attention by default, so that equal layers are compiled once.
        **options: As for :func:`stitchcache.compile`: ``backend``, ``cache``, ``check``, ...

    Returns:
        An encoder of the same class. ``compiled`` is the transformer's :class:`~stitchcache.CompiledModel`.
        A call that passes other arguments than texts bring (hidden states, say) runs the model itself.

    Raises:
        OptionError: The model's first module is no transformer over token ids, or an argument makes no sense.
        CaptureError: The transformer cannot be captured.
        BackendError: A piece cannot be compiled.
        CacheMissError: As for :func:`stitchcache.compile`.
    """
    check_kind("model", model, SentenceTransformer, "a sentence_transformers.SentenceTransformer")
    transformer = getattr(model[0], "auto_model", None)
    longest = tokens or model.max_seq_length
    if not isinstance(transformer, torch.nn.Module) or longest is None:
        raise OptionError(
            f"{type(model[0]).__name__}, the first module, is no transformer with a limit of tokens. Pass "
            "tokens=, or compile its parts with stitchcache.compile.",
            option="model",
        )
    encoder: SentenceTransformer = _copied(model)
    stage, inner = _copied(model[0]), _copied(transformer)
    encoder[0], stage.model = stage, inner
    seen: dict[str, Any] = {}

    @functools.wraps(transformer.forward)
    def note(**given: Any) -> Any:
        seen.update(given)
        return transformer.forward(**given)

    inner.forward = note
    encoder.encode(["An example.", "And another one, which is longer."], show_progress_bar=False)
    # torch.export takes no shapes for what **kwargs collects, and this is what models return anyway.
    if seen.pop("return_dict", True) is not True or not all(map(_is_text, seen.values())):
        raise OptionError(
            f"{type(transformer).__name__} takes {', '.join(seen)} of a text, and only token ids and "
            "masks can vary here. Compile it with stitchcache.compile.",
            option="model",
        )
    rows, length = Dim("batch", 1, batch), Dim("tokens", 2, longest)
    shapes = {name: {0: rows, 1: length} for name in seen}
    compiled = stitchcache.compile(
        transformer, (), seen, dynamic_shapes=shapes, splitting_ops=splitting_ops, **options
    )

    @functools.wraps(transformer.forward)
    def forward(*args: Any, **given: Any) -> Any:
        taken = {name: value for name, value in given.items() if name != "return_dict"}
        if args or taken.keys() != seen.keys() or given.get("return_dict") is False:
            return transformer.forward(*args, **given)
        return compiled(**taken)

    inner.forward = forward
    # A compiled model is a module, and an encoder calls all modules that it has.
    vars(encoder)["compiled"] = compiled
    return encoder


def _is_text(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 2


def _copied(module: Any) -> Any:
    """A module that shares another one's parts, and may be given others."""
    made = copy.copy(module)
    for table in ("_parameters", "_buffers", "_modules"):
        setattr(made, table, getattr(module, table).copy())
    return made
