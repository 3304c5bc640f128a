"""What a refused model's error advises, by what stopped torch.export."""

from __future__ import annotations

import dataclasses
import re

import pytest
import scaled_models
import torch
from torch import nn

import stitchcache
from stitchcache import Dim, errors


class Double(nn.Module):
    def forward(self, x):
        return x * 2


class Keywords(nn.Module):
    def forward(self, x, **more):
        return x * 2 + more["y"]


class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@dataclasses.dataclass
class Pair:
    a: torch.Tensor


class Takes(nn.Module):
    def forward(self, pair):
        return pair.a * 2


class Gives(nn.Module):
    def forward(self, x):
        return Pair(x * 2)


x, B = torch.ones(2, 4), Dim("b", 1, 8)


def refused(tmp_path, model, args, kwargs=None, **options) -> str:
    with pytest.raises(errors.StitchCacheError) as caught:
        stitchcache.compile(
            model.eval(), args, kwargs, backend="eager", cache=stitchcache.Cache(tmp_path), **options
        )
    return str(caught.value)


@pytest.mark.parametrize(
    "shapes",
    [({5: B},), ({0: B}, {0: B}), {"y": {0: B}}, {0: B}, ({0: "b"},), 5, ({0: Dim("b", 3, 8)},), ({0: 3},)],
    ids=["dim5", "two", "name", "flat", "text", "number", "range", "static"],
)
def test_wrong_dynamic_shapes(tmp_path, shapes):
    said = refused(tmp_path, Double(), (x,), dynamic_shapes=shapes)
    assert "dynamic_shapes does not fit" in said
    assert "(forward(x))" in said
    assert "torch.where" not in said


def test_shapes_of_collected_keywords(tmp_path):
    said = refused(tmp_path, Keywords(), (x,), {"y": x}, dynamic_shapes={"x": {0: B}, "more": {"y": {0: B}}})
    assert "no shapes for what **more collects: name those arguments" in said


def test_a_branch_on_a_value(tmp_path):
    said = refused(tmp_path, Branch(), (x,))
    assert "torch.where" in said
    assert "test_advice.py:" in said


def test_dataclasses_name_the_registration(tmp_path):
    named = rf"register_dataclass\(Pair, serialized_type_name='({Pair.__module__}\.)?Pair'\)"
    for said in (refused(tmp_path, Takes(), (Pair(x),)), refused(tmp_path, Gives(), (x,))):
        assert re.search(named, said)
    torch.export.register_dataclass(Pair)
    assert "serialized_type_name=" in refused(tmp_path, Gives(), (x,))


def test_a_call_that_the_model_does_not_take(tmp_path):
    said = refused(tmp_path, Double(), (x, x))
    assert "args and kwargs must be those of a call: forward(x)" in said
    assert "inspect.py" not in said


def test_quantized_modules(tmp_path):
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear})
    assert (
        "Quantized tensors and modules of torch.ao are out of scope. Quantize the model with torchao"
        in refused(tmp_path, model, (x,))
    )


def test_arguments_made_of_other_tensors(tmp_path):
    said = refused(tmp_path, Double(), (scaled_models.weight(4, 4, 7).data,))
    assert "x is a Scaled, a tensor that is made of others. Parameters and buffers may be" in said


def test_a_cache_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=10
    )
    model = transformers.LlamaForCausalLM(config)
    said = refused(tmp_path, model, (), {"input_ids": torch.ones(2, 4, dtype=torch.long)})
    assert "kwargs={'use_cache': False}" in said


def test_a_part_that_is_compiled_already(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    cache = stitchcache.Cache(tmp_path)
    model[0] = stitchcache.compile(model[0], (x,), backend="eager", cache=cache)
    assert "A part of the model is compiled already" in refused(tmp_path, model, (x,))
    assert "compiled already" in refused(tmp_path, model[0], (x,))


def test_a_size_of_one_is_fixed(tmp_path):
    said = refused(tmp_path, Double(), (torch.ones(1, 4),), dynamic_shapes=({0: B},))
    assert "an example's size of 0 or 1 is fixed too" in said
