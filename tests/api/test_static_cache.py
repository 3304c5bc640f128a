"""A static cache that plain objects hold: prefill and decode compiled apart give eager's tokens."""

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.integrations.executorch")

SOURCE = """
    import json, torch, stitchcache
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
    from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

    def llama():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64,
        )
        return LlamaForCausalLM(config).eval()

    class Ours(torch.nn.Module):
        # The cache is no module, and none of its tensors is a buffer.
        def __init__(self):
            super().__init__()
            self.model = llama()
            self.cache = StaticCache(config=self.model.config, max_cache_len=16)
            self.cache.early_initialization(1, 2, 8, torch.float32, torch.device("cpu"))

        def forward(self, input_ids, cache_position):
            for layer in self.cache.layers:
                layer.cumulative_length.copy_(cache_position[0])
            return self.model(input_ids, past_key_values=self.cache, use_cache=True).logits

    def theirs():
        model = llama()
        model.generation_config.use_cache = True
        model.generation_config.cache_implementation = "static"
        return TorchExportableModuleWithStaticCache(model, batch_size=1, max_cache_len=16)

    prompt = torch.tensor([[3, 5, 7, 9]])

    def tokens(prefill, decode):
        logits, found = prefill(input_ids=prompt, cache_position=torch.arange(4)), []
        for step in range(5):
            found.append(int(logits[:, -1].argmax(-1)))
            logits = decode(input_ids=torch.tensor([found[-1:]]), cache_position=torch.tensor([4 + step]))
        return found

    said = {}
    for name, build in (("ours", Ours), ("theirs", theirs)):
        with torch.no_grad():
            eager = build().eval()
            want = tokens(eager, eager)
            model = build().eval()
            prefill, decode = (
                stitchcache.compile(
                    model,
                    (),
                    {"input_ids": ids, "cache_position": torch.arange(ids.shape[1])},
                    backend="eager",
                )
                for ids in (prompt, prompt[:, :1])
            )
            # Twice: what the first run left in the cache is written over, as in eager.
            got = [tokens(prefill, decode) for _ in range(2)]
        assert got == [want, want], (name, got, want)
        said[name] = [prefill.cache_hit, decode.cache_hit]
    print(json.dumps(said))
"""


def test_prefill_and_decode_compiled_apart(fresh_process):
    first, second = fresh_process(SOURCE), fresh_process(SOURCE)
    assert first == {"ours": [None, None], "theirs": [None, None]}
    assert all(hit in ("direct", "graph") for hits in second.values() for hit in hits)
