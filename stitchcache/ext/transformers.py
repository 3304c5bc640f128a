"""``generate`` of transformers over compiled steps (``pip install 'stitchcache[transformers]'``).

A step is one call of the model over a static cache, which it writes in place. A prefill takes the prompt, a
decode one token a row. Both are compiled for each number of rows; ``generate`` itself stays transformers'.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

import stitchcache
from stitchcache.errors import InputMismatchError, OptionError, check_kind
from stitchcache.options import Dim
from stitchcache.pipeline.find import check_model
from stitchcache.runtime.model import CompiledModel

ATTENTION = "aten::scaled_dot_product_attention"
_CACHE_NAMES = ("cache", "past_key_values")
"""What models call their cache: transformers has renamed it."""
_TAKEN = ("input_ids", "attention_mask", "position_ids")
# What generate passes to every step, with the values that the steps were captured with.
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "use_cache": (True,), "logits_to_keep": (1,), "return_dict": (True,), "token_type_ids": (),
}  # fmt: skip


class _SlidingLayer(StaticLayer):  # type: ignore[no-untyped-call]
    """A sliding window as a full layer: the mask alone hides what lies before the window.

    transformers' own counts tokens in Python, which no graph can.
    """

    is_sliding = True


class _Cache(StaticCache):
    """A static cache that stays where it is in memory: compiled steps hold its tensors."""

    def __init__(self, config: Any, max_cache_len: int) -> None:
        super().__init__(config=config, max_cache_len=max_cache_len)
        for place, layer in enumerate(self.layers):
            if type(layer) is StaticSlidingWindowLayer:
                self.layers[place] = _SlidingLayer(max_cache_len=max_cache_len)
            elif type(layer) is not StaticLayer:
                raise OptionError(
                    f"layer {place} of this model keeps a {type(layer).__name__}, and only static key-value "
                    "layers can be compiled here. Call generate of the model itself.",
                    option="model",
                )

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Follow the beams, in place: transformers puts new tensors into the layers."""
        layers: Any = self.layers
        for layer in layers:
            for states in (layer.keys, layer.values):
                states.copy_(states.index_select(0, beam_idx.to(states.device)))


class _Step(torch.nn.Module):
    """One call of a model over a cache, for its next logits."""

    def __init__(self, model: Any, cache: _Cache, cache_name: str) -> None:
        super().__init__()
        self.model, self.cache, self.cache_name = model, cache, cache_name
        self.training = False

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any) -> torch.Tensor:
        taken = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        said = {"use_cache": True, "logits_to_keep": 1, self.cache_name: self.cache}
        logits: torch.Tensor = self.model(**taken, **said).logits
        return logits


class _Lane:
    """The steps for one number of rows, with their cache: one ``generate`` at a time."""

    def __init__(
        self, model: Any, cache_name: str, rows: int, prompt: int, length: int, options: Mapping[str, Any]
    ) -> None:
        self.model, self.cache = model, _Cache(model.config, length)
        self.cache_name, self.prompt, self.length = cache_name, prompt, length
        self.lock, self.filled = threading.Lock(), 0
        self.step = _Step(model, self.cache, cache_name)
        with torch.no_grad():
            # transformers knows the shapes of a layer when it is first used.
            ids = torch.zeros(rows, 1, dtype=torch.long, device=model.device)
            model(input_ids=ids, use_cache=True, **{cache_name: self.cache})
        self.reset()
        self.steps = {"decode": self._make(rows, 1, None, options)}
        if prompt > 1:
            tokens = Dim("prompt", 2, prompt) if prompt > 2 else None
            self.steps = {"prefill": self._make(rows, min(prompt, 16), tokens, options), **self.steps}

    def reset(self) -> None:
        self.cache.reset()  # type: ignore[no-untyped-call]
        self.filled = 0

    def _make(self, rows: int, count: int, tokens: Dim | None, options: Mapping[str, Any]) -> CompiledModel:
        ids = (torch.arange(rows * count, device=self.model.device) % 7).view(rows, count)
        given = self.model.prepare_inputs_for_generation(
            ids,
            attention_mask=torch.ones_like(ids),
            position_ids=torch.arange(count, device=ids.device).expand(rows, count).contiguous(),
            use_cache=True,
            is_first_iteration=count > 1,
            **{self.cache_name: self.cache},
        )
        example = self._taken(given)
        self.reset()
        shapes = None
        if tokens is not None:
            masks = example["attention_mask"]
            # A model with several kinds of attention has a mask for each.
            mask = {name: {2: tokens} for name in masks} if isinstance(masks, dict) else {2: tokens}
            shapes = {"input_ids": {1: tokens}, "attention_mask": mask, "position_ids": {1: tokens}}
        compiled = stitchcache.compile(self.step, (), example, dynamic_shapes=shapes, **options)
        self.reset()
        return compiled

    def _taken(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What a step takes; transformers leaves out a mask that would hide the future only."""
        ids = given["input_ids"]
        masks: Any = given.get("attention_mask")

        def whole(mask: Any) -> Any:
            return mask if mask is not None else self._causal(*ids.shape)

        several = isinstance(masks, dict)
        return {
            "input_ids": ids,
            # Sorted: transformers fills this dict from a set, whose order moves with the hash seed.
            "attention_mask": {n: whole(masks[n]) for n in sorted(masks)} if several else whole(masks),
            # A prefill in chunks passes a part of a longer row.
            "position_ids": given["position_ids"].contiguous(),
        }

    def _causal(self, rows: int, tokens: int) -> torch.Tensor:
        last = torch.arange(self.filled, self.filled + tokens, device=self.model.device)
        seen = torch.arange(self.length, device=self.model.device) <= last[:, None]
        return seen.expand(rows, 1, tokens, self.length).contiguous()

    def run(self, given: dict[str, Any]) -> Any:
        taken = self._taken(given)
        for name, value in given.items():
            if name in taken or name == self.cache_name:
                continue
            plain = not isinstance(value, torch.Tensor)
            if value is not None and not (plain and value in _FIXED.get(name, ())):
                raise OptionError(
                    f"generate passed {name}={value!r} to a step, and compiled steps return the logits of "
                    "the last token only. Leave out what asks for it, or call generate of the model itself.",
                    option=name,
                )
        tokens = taken["input_ids"].shape[1]
        if self.filled + tokens > self.length:
            raise _too_long(self.filled + tokens, self.length)
        if tokens > self.prompt:
            raise InputMismatchError(
                f"a prompt of {tokens} tokens: this was compiled for prompts of up to {self.prompt}. Compile "
                "with a larger prompt=, or generate with prefill_chunk_size= of up to that many.",
                argument="input_ids",
                expected=f"up to {self.prompt} tokens",
                actual=str(tokens),
            )
        logits = self.steps["decode" if tokens == 1 else "prefill"](**taken)
        self.filled += tokens
        made: Any = CausalLMOutputWithPast
        return made(logits=logits, **{self.cache_name: self.cache})


def _too_long(tokens: int, length: int) -> InputMismatchError:
    return InputMismatchError(
        f"prompt and new tokens need a cache of {tokens}, and this was compiled with cache_length={length}. "
        "Ask for fewer new tokens, or compile with a larger cache_length=.",
        argument="cache_length",
        expected=f"up to {length}",
        actual=str(tokens),
    )


class _Generate:
    """What stands behind ``generate`` of a compiled model."""

    def __init__(self, model: Any, lanes: Mapping[int, _Lane], cache_name: str) -> None:
        self.model, self.lanes, self.cache_name = model, lanes, cache_name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get(self.cache_name)
        lane = next((lane for lane in self.lanes.values() if lane.cache is cache), None)
        # A call that is no step of a generate is the model's own.
        return self.model.forward(*args, **kwargs) if lane is None else lane.run(kwargs)

    def generate(self, proxy: Any, inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> Any:
        given = kwargs.get("input_ids", inputs)
        check_kind("inputs", given, torch.Tensor, "the prompt's token ids")
        config = generation_config or self.model.generation_config
        asked = {name: kwargs.get(name, getattr(config, name, None)) for name in _ASKED}
        for name in (*_CACHE_NAMES, "cache_implementation", "assistant_model", "inputs_embeds"):
            if kwargs.get(name) is not None:
                raise _refused(name, kwargs[name])
        if asked["use_cache"] is False:
            raise _refused("use_cache", False)
        rows = given.shape[0] * max(asked["num_beams"] or 1, asked["num_return_sequences"] or 1)
        lane = self.lanes.get(rows)
        if lane is None:
            sizes = ", ".join(map(str, self.lanes))
            raise InputMismatchError(
                f"{rows} rows (prompts times beams or returned sequences): this was compiled for {sizes}. "
                f"Compile with batch=({sizes}, {rows}), or bring the prompts to one of these numbers.",
                argument="batch",
                expected=sizes,
                actual=str(rows),
            )
        new = asked["max_new_tokens"]
        if new is not None and given.shape[1] + new - 1 > lane.length:
            raise _too_long(given.shape[1] + new - 1, lane.length)
        with lane.lock:
            lane.reset()
            # On a GPU generate would call torch.compile for a static cache.
            own = {self.cache_name: lane.cache, "disable_compile": True}
            return type(self.model).generate(proxy, inputs, generation_config, **{**kwargs, **own})


_ASKED = ("use_cache", "num_beams", "num_return_sequences", "max_new_tokens")


def _refused(name: str, value: Any) -> OptionError:
    shown = type(value).__name__ if not isinstance(value, (bool, str)) else repr(value)
    return OptionError(
        f"generate({name}={shown}): compiled steps take token ids and have a cache of their own. Leave it "
        "out, or call generate of the model itself.",
        option=name,
    )


def compile_generate(
    model: PreTrainedModel,
    *,
    batch: int | Sequence[int] = 1,
    prompt: int,
    cache_length: int,
    splitting_ops: Sequence[str] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Compile a decoder's steps, or load them, for ``generate``.

    Args:
        model: A causal language model in evaluation mode. It is not changed; its weights are shared.
        batch: Numbers of rows that get steps of their own: prompts times beams or returned sequences.
        prompt: Tokens of the longest prompt.
        cache_length: Tokens that the cache holds: those of a prompt and the new ones.
        splitting_ops: Ops to split at. ``None`` takes attention for a model whose heads share keys, so that
            equal layers are compiled once, and none for others, whose keys a piece would return as it
            writes them.
        **options: As for :func:`stitchcache.compile`: ``backend``, ``cache``, ``check``, ...

    Returns:
        A model of the same class, whose ``generate`` runs the compiled steps: greedy, sampling and beams. One
        ``generate`` at a time runs for a number of rows; others wait. Calls of the model itself run eagerly.
        ``steps`` has a :class:`~stitchcache.CompiledModel` for each: ``{"prefill 1": ..., "decode 1": ...}``.

    Raises:
        OptionError: The model has no causal ``generate`` over a static cache, or an argument makes no sense.
        CaptureError: A step cannot be captured.
        BackendError: A piece cannot be compiled.
        CacheMissError: As for :func:`stitchcache.compile`.
    """
    check_model(model, (), {})
    parameters = inspect.signature(model.forward).parameters
    cache_name = next((name for name in _CACHE_NAMES if name in parameters), None)
    lacking = [name for name in (*_TAKEN, "logits_to_keep") if name not in parameters]
    if cache_name is None or lacking or not model.can_generate() or model.config.is_encoder_decoder:
        raise OptionError(
            f"{type(model).__name__} is no causal language model over token ids"
            f"{': its forward takes no ' + ', '.join(lacking) if lacking else ''}. Compile its forward with "
            "stitchcache.compile.",
            option="model",
        )
    sizes = tuple(dict.fromkeys((batch,) if isinstance(batch, int) else batch))
    for name, value, least in (("prompt", prompt, 1), ("cache_length", cache_length, prompt)):
        if type(value) is not int or value < least:
            raise OptionError(f"{name}={value!r}: give a whole number of at least {least}.", option=name)
    if not sizes or any(type(size) is not int or size < 1 for size in sizes):
        raise OptionError(f"batch={batch!r}: give a number of rows, or a list of them.", option="batch")
    if splitting_ops is None:
        config = model.config.get_text_config(decoder=True)
        heads = getattr(config, "num_attention_heads", 1)
        splitting_ops = (ATTENTION,) if getattr(config, "num_key_value_heads", heads) != heads else ()
    options["splitting_ops"] = splitting_ops
    lanes = {size: _Lane(model, cache_name, size, prompt, cache_length, options) for size in sizes}
    compiled = _Generate(model, lanes, cache_name)
    proxy: Any = copy.copy(model)
    proxy.forward = functools.wraps(proxy.forward)(functools.partial(compiled.forward))
    proxy.generate = functools.wraps(proxy.generate)(functools.partial(compiled.generate, proxy))
    proxy.steps = {f"{name} {size}": step for size in sizes for name, step in lanes[size].steps.items()}
    found: PreTrainedModel = proxy
    return found
