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
    assert sum(result["found"].values()) == min(count, result["possible"])
    # Of those whose file is right again, some change what does not run: they may be served.
    for how in ("", ", put back"):
        alive = {kind: result["found"].get(kind + how, 0) for kind in ("miss", "right")}
        assert sum(alive.values()) > min(count, result["possible"]) / 8, result
    assert result["found"].get("right", 0) == 0, result


def test_every_kind_of_site_is_changed():
    source = "x = 1\ny = f(x, a=2) + 3\nif x > y:\n    z = -x\n"
    found = {name: make() for name, make in mutants(source)}
    assert {name.partition(" ")[0] for name in found} == {
        "literal",
        "operator",
        "call",
        "keyword",
        "statement",
    }
    texts = [make() for _, make in mutants(source)]
    assert len(set(texts)) == len(texts) > 20
    assert source not in found.values()


def test_zoo():
    count = 500 if FULL else 90
    check(run("zoo_model", HERE / "zoo.py", count), count)


# Name of the model and its classes' prefix; how many mutants of it the full run takes.
COPIES = {"llama": ("Llama", 800), "qwen3": ("Qwen3", 800)}


@pytest.mark.parametrize("name", COPIES if FULL else ["llama"])
def test_copy_of_a_transformers_model(name, tmp_path):
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        pytest.skip("transformers is not installed")
    folder, prefix = Path(spec.origin).parent / "models" / name, COPIES[name][0]
    text = (folder / f"modeling_{name}.py").read_text()
    text = re.sub(r"from \.\.\.", "from transformers.", text)
    text = re.sub(
        rf"from \.configuration_{name}", f"from transformers.models.{name}.configuration_{name}", text
    )
    text += f"""

def build():
    torch.manual_seed(0)
    config = {prefix}Config(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, attn_implementation="sdpa", use_cache=False,
        head_dim=8,
    )
    return {prefix}ForCausalLM(config).eval(), (torch.arange(8)[None],), {{"return_dict": False}}
"""
    file = tmp_path / f"{name}_copy.py"
    file.write_text(text)
    count = COPIES[name][1] if FULL else 60
    check(run(f"{name}_copy", file, count, f"transformers.models.{name}.modeling_{name}"), count)
