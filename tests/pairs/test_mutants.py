"""Mutants of source, made by a tool: none may be served what its original computed."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mutants import mutants

HERE = Path(__file__).parent
FULL = os.environ.get("STITCHCACHE_FULL") == "1"


def run(module, file, count, *first):
    path = os.pathsep.join([str(HERE), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "mutants_run.py"), module, str(file), str(count), *first],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def check(result, count):
    assert (result["begun"], result["again"]) == ("compiled", "right"), result
    assert result["wrong"] == [], result
    assert sum(result["found"].values()) >= min(count, result["possible"]) * 0.9
    assert result["found"].get("miss", 0) > sum(result["found"].values()) / 4, result


def test_every_kind_of_site_is_changed():
    source = "x = 1\ny = f(x, a=2) + 3\nif x > y:\n    z = -x\n"
    found = dict(mutants(source))
    assert {name.partition(" ")[0] for name in found} == {
        "literal",
        "operator",
        "call",
        "keyword",
        "statement",
    }
    assert len(set(found.values())) == len(found)
    assert source not in found.values()


def test_zoo():
    count = 800 if FULL else 90
    check(run("zoo_model", HERE / "zoo.py", count), count)


def test_copy_of_a_transformers_model(tmp_path):
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        pytest.skip("transformers is not installed")
    folder = Path(spec.origin).parent / "models" / "llama"
    text = (folder / "modeling_llama.py").read_text()
    text = re.sub(r"from \.\.\.", "from transformers.", text)
    text = re.sub(r"from \.configuration_llama", "from transformers.models.llama.configuration_llama", text)
    text += """

def build():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, attn_implementation="sdpa", use_cache=False,
    )
    return LlamaForCausalLM(config).eval(), (torch.arange(8)[None],), {"return_dict": False}
"""
    file = tmp_path / "llama_copy.py"
    file.write_text(text)
    count = 1200 if FULL else 60
    check(run("llama_copy", file, count, "transformers.models.llama.modeling_llama"), count)
