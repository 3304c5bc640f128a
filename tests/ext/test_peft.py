"""A model with adapters of peft starts directly in every process, whatever its hash seed is."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("peft", reason="needs peft")
pytest.importorskip("transformers", reason="needs transformers")

CHILD = """
import torch, transformers, peft, stitchcache
torch.manual_seed(0)
config = transformers.BertConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
)
adapters = peft.LoraConfig(r=2, target_modules=["query", "key", "value"], init_lora_weights=False)
model = peft.get_peft_model(transformers.BertModel(config).eval(), adapters).eval()
ids = torch.arange(8).view(1, 8)
compiled = stitchcache.compile(model, (), {"input_ids": ids}, backend="eager")
with torch.no_grad():
    expected = model(input_ids=ids).last_hidden_state
torch.testing.assert_close(compiled(input_ids=ids).last_hidden_state, expected)
print("hit:", compiled.cache_hit)
"""


def test_direct_under_any_hash_seed(tmp_path):
    hits = []
    words = [sys.executable, "-c", CHILD]
    for seed in range(6):
        env = {**os.environ, "PYTHONHASHSEED": str(seed), "STITCHCACHE_DIR": str(tmp_path)}
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        hits.append(done.stdout.partition("hit:")[2].strip())
    assert hits == ["None", *["direct"] * 5]
