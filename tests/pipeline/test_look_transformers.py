"""An embedding model made from a decoder: transformers builds its mask only while it is traced."""

import copy

import pytest
import torch

import stitchcache
from stitchcache.errors import ModelMismatchError

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.examples


def _qwen(causal):
    config = transformers.Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = transformers.Qwen3Model(config).eval()
    if not causal:
        for layer in model.layers:
            layer.self_attn.is_causal = False
    return model


IDS = torch.arange(18).reshape(2, 9)
PLAIN = {"use_cache": False}


def test_a_bidirectional_decoder_is_an_error_and_gets_no_causal_entry(tmp_path):
    cache = stitchcache.Cache(tmp_path / "cache")
    causal, free = _qwen(causal=True), _qwen(causal=False)
    with torch.no_grad():
        apart = (causal(IDS, **PLAIN)[0] - free(IDS, **PLAIN)[0]).abs().max()
    assert apart > 0.1, "the two kinds of model differ"
    compiled = stitchcache.compile(causal, (IDS,), PLAIN, backend="eager", cache=cache)
    assert compiled.check.state == "agreed"
    # Its graph is the causal one's, and so the entry that it would be served.
    served = stitchcache.compile(free, (IDS,), PLAIN, backend="eager", cache=cache, check="none")
    assert (served.cache_hit, served.graph_hash) == ("graph", compiled.graph_hash)
    for store in (cache, stitchcache.Cache(tmp_path / "fresh")):
        with pytest.raises(ModelMismatchError, match="last_hidden_state") as raised:
            stitchcache.compile(copy.deepcopy(free), (IDS,), PLAIN, backend="eager", cache=store)
        assert raised.value.module.startswith("layers.0.self_attn (Qwen3Attention)")
        assert raised.value.output == "output['last_hidden_state']"
    # The causal one's entry is as it was.
    again = stitchcache.compile(causal, (IDS,), PLAIN, backend="eager", cache=cache)
    assert (again.graph_hash, again.check.state) == (compiled.graph_hash, "agreed")
    assert not stitchcache.Cache(tmp_path / "fresh").entries()


def test_verify_sees_it_under_torch_compile():
    free = _qwen(causal=False)
    compiled = torch.compile(free, backend="eager")
    with torch.no_grad():
        found = stitchcache.verify(free, compiled, (IDS,), PLAIN)
        assert stitchcache.verify(_qwen(True), torch.compile(_qwen(True), backend="eager"), (IDS,), PLAIN)
    assert (found.state, found.output) == ("mismatch", "output['last_hidden_state']")
