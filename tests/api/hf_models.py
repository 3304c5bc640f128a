"""Tiny models of transformers with random weights: ``hf_models.py ROAD NAME...``.

Compiles each through a road (``compile`` is ``stitchcache.compile``), calls, and prints what came of it as
JSON, by name. ``NAME+OTHER`` builds another model beforehand, as a program with other models would. Each has
a process of its own, forked from one that has torch and transformers: importing them takes longer than most
models. Weights come from a seed, so that two processes have the same model.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import sys
import traceback

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers

import stitchcache

SDPA = "aten::scaled_dot_product_attention"
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
LENGTH = stitchcache.Dim("length", min=2, max=64)
BATCH = stitchcache.Dim("batch", min=1, max=8)
IDS = {"input_ids": {0: BATCH, 1: LENGTH}}
# Class of the model, class and fields of its configuration, dynamic shapes, splitting ops, backend.
MODELS = {
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**SMALL, **HEADS, "use_cache": False},
        IDS,
        [SDPA],
        "eager",
    ),
    "qwen3": (
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {**SMALL, **HEADS, "head_dim": 16, "use_cache": False},
        IDS,
        [SDPA],
        "eager",
    ),
    "bert": (
        "BertModel",
        "BertConfig",
        {**SMALL, "num_attention_heads": 2, "max_position_embeddings": 64},
        {**IDS, "attention_mask": {0: BATCH, 1: LENGTH}},
        [],
        "inductor",
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "use_cache": False},
        IDS,
        [SDPA],
        "eager",
    ),
    "vit": (
        "ViTModel",
        "ViTConfig",
        {
            **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
            **{"image_size": 16, "patch_size": 8},
        },
        {"pixel_values": {0: BATCH}},
        [],
        "aoti",
    ),
    "resnet": (
        "ResNetModel",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        {"pixel_values": {0: BATCH}},
        [],
        "eager",
    ),
}


def build(name):
    """A model in evaluation mode; the same weights in every process."""
    model, config, fields, *_ = MODELS[name]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**fields)).eval()


def inputs(name, rows, length):
    """Arguments by keyword; images have the sizes of the configuration."""
    names = MODELS[name][3]
    generator = torch.Generator().manual_seed(100 * rows + length)
    if "pixel_values" in names:
        side = MODELS[name][2].get("image_size", 32)
        return {"pixel_values": torch.randn(rows, 3, side, side, generator=generator)}
    found = {"input_ids": torch.randint(0, 64, (rows, length), generator=generator)}
    if "attention_mask" in names:
        mask = torch.ones(rows, length, dtype=torch.long)
        mask[0, length // 2 :] = 0
        found["attention_mask"] = mask
    return found


def by_compile(model, name, example):
    """The first road: ``stitchcache.compile``."""
    *_, shapes, ops, backend = MODELS[name]
    return stitchcache.compile(model, (), example, dynamic_shapes=shapes, splitting_ops=ops, backend=backend)


class Graphs(logging.Handler):
    """What became of each graph that Dynamo captured, from the log; looks like a compiled model."""

    def __init__(self, function):
        super().__init__()
        self.function, self.lines = function, []
        self.artifact = stitchcache.Artifact(graph_hash="", variants=())

    def __call__(self, **given):
        return self.function(**given)

    def emit(self, record):
        self.lines.append(record.getMessage())

    @property
    def graph_hash(self):
        return " ".join(re.findall(r"(?:compiled|hit) ([0-9a-f]{12}) in ", " ".join(self.lines)))

    @property
    def cache_hit(self):
        made = [line.partition(": ")[2] for line in self.lines]
        return "graph" if made and all(line.startswith("graph hit ") for line in made) else None


def by_torch_compile(model, name, example):
    """The second road: Dynamo with our backend; the pieces are not compiled."""
    options = {"splitting_ops": MODELS[name][4], "backend": "eager"}
    graphs = Graphs(torch.compile(model, backend="stitchcache", dynamic=True, options=options))
    logger = logging.getLogger("stitchcache")
    logger.addHandler(graphs)
    logger.setLevel(logging.INFO)
    return graphs


ROADS = {"compile": by_compile, "torch-compile": by_torch_compile}


def tensors(output):
    """Every tensor of an output, by name."""
    return {key: value for key, value in output.items() if isinstance(value, torch.Tensor)}


def difference(compiled, model, name, rows, length):
    """Largest difference from eager over all tensors of the output."""
    given = inputs(name, rows, length)
    with torch.no_grad():
        ours, eager = compiled(**given), model(**given)
    if type(ours) is not type(eager) or tensors(ours).keys() != tensors(eager).keys():
        raise SystemExit(f"{name}: {type(ours)} with {list(ours)}, not {type(eager)} with {list(eager)}")
    return max(float((tensors(ours)[key] - value).abs().max()) for key, value in tensors(eager).items())


def run(road, name, *others):
    """What came of one model."""
    for other in others:
        build(other)
    model = build(name)
    compilers = ("torch._dynamo", "torch._inductor.compile_fx")
    before = {module for module in compilers if module in sys.modules}
    compiled = ROADS[road](model, name, inputs(name, 2, 7))
    after = {module for module in compilers if module in sys.modules}
    # What was captured of GPT-2 is served from two rows on.
    sizes = ((2, 7), (2 if name == "gpt2" else 1, 2), (3, 64))
    differences = [difference(compiled, model, name, *size) for size in sizes]
    return {
        "hit": compiled.cache_hit,
        "graph_hash": compiled.graph_hash,
        "pieces": len(compiled.artifact.pieces),
        "distinct": len({piece.blob.digest for piece in compiled.artifact.pieces}),
        "imported": sorted(after - before),
        "parsed": "stitchcache.codegen.gate" in sys.modules,
        "differences": differences,
    }


def forked(road, *names):
    """The same of a forked process."""
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            result = run(road, *names)
        except BaseException:  # noqa: BLE001 - a child reports whatever happens in it
            result = {"error": traceback.format_exc()}
        with os.fdopen(write, "w") as out:
            json.dump(result, out)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as source:
        text = source.read()
    os.wait()
    return json.loads(text) if text else {"error": "the child died"}


def main():
    road, *names = sys.argv[1:]
    # A fork finds no team of threads.
    torch.set_num_threads(1)
    if road == "torch-compile":
        importlib.import_module("torch._dynamo")
    print(json.dumps({name.partition("+")[0]: forked(road, *name.split("+")) for name in names}))


if __name__ == "__main__":
    main()
