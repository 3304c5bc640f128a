"""``generate`` over compiled steps gives the tokens that the model itself gives, in the next process too."""

import os

import pytest

pytest.importorskip("transformers")

SOURCE = """
    import json, logging, sys
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
    import stitchcache
    from stitchcache.errors import InputMismatchError, OptionError
    from stitchcache.ext.transformers import compile_generate

    logging.getLogger("transformers").setLevel(logging.ERROR)
    sizes = dict(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, eos_token_id=None,
    )
    windows = dict(use_sliding_window=True, sliding_window=8, max_window_layers=1, head_dim=8)
    kinds = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**sizes, **windows)),
    }
    torch.manual_seed(0)
    model = kinds[KIND]().eval()
    ids = torch.randint(1, 128, (2, 8), generator=torch.Generator().manual_seed(1))
    ours = compile_generate(model, batch=2, prompt=16, cache_length=48, backend="eager")
    greedy, sampled = dict(do_sample=False), dict(do_sample=True)
    same = []
    padded = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
    for given, options in [
        (ids, dict(greedy, max_new_tokens=32)),
        (ids, dict(greedy, max_new_tokens=8, attention_mask=padded)),
        (ids[:, :1], dict(greedy, max_new_tokens=4)),
        (ids, dict(greedy, max_new_tokens=4, prefill_chunk_size=3)),
        (ids, dict(sampled, max_new_tokens=8)),
        (ids[:1], dict(greedy, max_new_tokens=8, num_beams=2)),
        (ids[:1], dict(sampled, max_new_tokens=8, num_return_sequences=2)),
    ]:
        tokens = []
        for each in (model, ours):
            torch.manual_seed(3)
            tokens.append(each.generate(given, **options))
        same.append(torch.equal(*tokens))
    refused = {}
    for name, given, options in [
        ("cache_length", ids, dict(max_new_tokens=99)),
        ("batch", ids, dict(num_beams=3)),
        ("input_ids", ids.repeat(1, 3), dict(max_new_tokens=2)),
        ("output_attentions", ids, dict(output_attentions=True, return_dict_in_generate=True)),
        ("use_cache", ids, dict(use_cache=False)),
        ("cache_implementation", ids, dict(cache_implementation="static")),
    ]:
        try:
            ours.generate(given, **{**greedy, "max_new_tokens": 2, **options})
        except (InputMismatchError, OptionError) as error:
            refused[name] = getattr(error, "argument", "") or error.option
    with torch.no_grad():
        logits = ours(ids).logits.equal(model(ids).logits)
    print(json.dumps({
        "same": same, "refused": refused, "hits": [step.cache_hit for step in ours.steps.values()],
        "why": [str(step.explain()) for step in ours.steps.values()],
        "kind": type(ours) is type(model), "logits": logits, "unchanged": "generate" not in vars(model),
    }))
"""


KINDS = ["qwen3", "llama"] if os.environ.get("STITCHCACHE_FULL") else ["qwen3"]


@pytest.mark.parametrize("kind", KINDS)
def test_generate_gives_eagers_tokens(fresh_process, kind):
    source = SOURCE.replace("KIND", repr(kind))
    # Seeds that give a set of the two kinds of attention two orders: transformers makes one for the masks.
    for seed, hits in (("0", [None, None]), ("1", ["direct", "direct"])):
        said = fresh_process(source, env={"PYTHONHASHSEED": seed})
        assert said["same"] == [True] * 7
        assert all(name == error for name, error in said["refused"].items())
        assert len(said["refused"]) == 6
        assert said["hits"] == hits, "\n\n".join(said["why"])
        assert (said["kind"], said["logits"], said["unchanged"]) == (True, True, True)


def test_what_is_no_decoder_is_refused():
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    from stitchcache.errors import OptionError
    from stitchcache.ext.transformers import compile_generate

    small = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1}
    with pytest.raises(OptionError, match="no causal language model"):
        compile_generate(BertModel(BertConfig(**small)).eval(), prompt=4, cache_length=8)
    model = LlamaForCausalLM(LlamaConfig(**small, vocab_size=16))
    with pytest.raises(OptionError, match=r"model\.eval"):
        compile_generate(model.train(), prompt=4, cache_length=8)
    for name, options in [
        ("cache_length", {"prompt": 4, "cache_length": 3}),
        ("prompt", {"prompt": 0, "cache_length": 3}),
        ("batch", {"prompt": 1, "cache_length": 3, "batch": ()}),
    ]:
        with pytest.raises(OptionError) as caught:
            compile_generate(model.eval(), **options)
        assert caught.value.option == name
