"""The demo's decoder."""

from __future__ import annotations

from pathlib import Path

import torch

import stitchcache
from stitchcache.api.prewarm import find_targets
from stitchcache.demo.decoder import ATTENTION, DecoderConfig, build, decoder_target, token_ids


def test_the_same_in_every_process_and_nothing_else_is_seeded():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, (ids,) = build(DecoderConfig())
    second, (again,) = build(DecoderConfig())
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(ids, again)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not first.training


def test_attention_is_causal_and_written_in_place():
    config = DecoderConfig(layers=2)
    model, _ = build(config)
    ids = token_ids(config, 2, 9)
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % config.vocabulary
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert before.shape == (2, 9, config.vocabulary)
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


def test_sizes_are_those_asked_for():
    config = DecoderConfig(layers=3, width=32, heads=2, vocabulary=50)
    model, (ids,) = build(config)
    assert len(model.layers) == 3
    assert model(ids).shape == (*ids.shape, 50)


def test_it_is_a_target():
    (target,) = find_targets("stitchcache.demo.decoder:target")
    assert target.splitting_ops == (ATTENTION,)
    assert target.name == decoder_target(DecoderConfig()).name
    model, args, kwargs = target.made()
    assert model(*args, **kwargs).shape == (2, 16, 128)


def test_building_it_imports_no_compiler(fresh_process):
    found = fresh_process(
        """
        import json, sys
        from stitchcache.demo.decoder import DecoderConfig, build, target
        model, args = build(DecoderConfig())
        model(*args)
        target()
        heavy = ("torch._dynamo", "torch._inductor", "sympy", "stitchcache.cli")
        print(json.dumps([name for name in heavy if name in sys.modules]))
        """
    )
    assert found == []


def test_the_docs_show_its_generated_code(tmp_path):
    target = decoder_target(DecoderConfig(layers=2))
    model, args, _ = target.made()
    options = {"dynamic_shapes": target.dynamic_shapes, "splitting_ops": target.splitting_ops}
    compiled = stitchcache.compile(
        model, args, backend="eager", cache=stitchcache.Cache(tmp_path), check="none", **options
    )
    page = (Path(__file__).parents[2] / "docs" / "generated-code.md").read_text()
    shown = page.partition("<!-- code of the demo -->\n```text\n")[2].partition("```")[0]
    assert compiled.artifact.code.replace(compiled.graph_hash, "HASH") == shown
