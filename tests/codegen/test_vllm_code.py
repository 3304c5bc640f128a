"""Code in vLLM's list ABI, and entries of earlier formats, run unchanged."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch

from stitchcache.codegen import compile_execution_fn
from stitchcache.errors import LinkError

DATA = Path(__file__).parent.parent / "data"
CASES = json.loads((DATA / "vllm_code" / "cases.json").read_text())
LEGACY = json.loads((DATA / "legacy" / "cases.json").read_text())


def tensors(value: Any) -> Any:
    """Lists of floats as tensors, whatever holds them."""
    if isinstance(value, list) and value and all(isinstance(item, float) for item in value):
        return torch.tensor(value)
    if isinstance(value, list):
        return [tensors(item) for item in value]
    return {key: tensors(item) for key, item in value.items()} if isinstance(value, dict) else value


def agree(actual: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(actual.to(torch.float64), expected.to(torch.float64))
    elif isinstance(expected, list):
        assert len(actual) == len(expected)
        for item, other in zip(actual, expected, strict=True):
            agree(item, other)
    elif isinstance(expected, dict):
        for key, other in expected.items():
            agree(actual[key], other)
    else:
        assert actual == expected


def bind(case: Any) -> Any:
    submods = {name: eval(source) for name, source in case["submods"].items()}
    consts = pickle.loads(bytes.fromhex(case["consts_pickle"])) if case["consts_pickle"] else None
    return compile_execution_fn(case["code"], submods, case["submod_names"], consts)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_recorded_code_runs(case: Any) -> None:
    arguments = [tensors(value) for value in case["args"]]
    expected = case["expect"]
    # A bare list of floats is one tensor; anything else is a structure of them.
    agree(bind(case)(*arguments), tensors(expected))


@pytest.mark.parametrize("case", [c for c in CASES if c["submods"]], ids=lambda case: case["name"])
def test_recorded_code_needs_its_pieces(case: Any) -> None:
    with pytest.raises(LinkError):
        bind({**case, "submods": {}})


@pytest.mark.parametrize("case", LEGACY, ids=lambda case: f"format {case['format']} {case['file'][:8]}")
def test_code_of_earlier_formats_runs(case: Any) -> None:
    data = (DATA / "legacy" / case["file"]).read_bytes()
    entry = pickle.loads(data) if case["format"] == 0 else msgpack.unpackb(data)
    consts = pickle.loads(entry["consts"]) if entry.get("consts") else None
    submods = {name: eval(source) for name, source in case["submods"].items()}
    code = entry.get("code") or entry["execution_code"]
    run = compile_execution_fn(code, submods, entry["submod_names"], consts)
    result = run(*[torch.tensor(a) if isinstance(a, list) else a for a in case["args"]])
    if isinstance(case["expect"], str):  # described in words
        agree(result[0], torch.tensor([2.5, 7.5]))
        agree(result[1]["k"], torch.tensor(case["args"][0]))
    else:
        agree(list(result) if isinstance(result, tuple) else result, tensors(case["expect"]))
