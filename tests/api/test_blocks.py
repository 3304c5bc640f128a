"""Repeated blocks are compiled once, run in place, and follow adapters that come, change and go."""

from __future__ import annotations

import copy
import importlib
import logging
from functools import partial

import block_models
import pytest
import torch

import stitchcache
from stitchcache import errors

X, SHIFT = torch.randn(2, 5, 8), torch.ones(8)


@pytest.fixture
def cache(tmp_path) -> stitchcache.Cache:
    return stitchcache.Cache(tmp_path / "cache")


@torch.no_grad()
def differs(model, blocks, x=X) -> float:
    """How far the compiled blocks are from the same blocks without."""
    ours = model(x, SHIFT)
    plain = copy.deepcopy(model)
    assert all("_compiled_call_impl" not in vars(module) for module in plain.modules())
    return float((ours - plain(x, SHIFT)).abs().max())


def hits(blocks) -> list[str | None]:
    return [compiled.cache_hit for compiled in blocks.compiled.values()]


def test_equal_blocks_are_one_entry(cache):
    model = block_models.model()
    names = list(model.state_dict())
    blocks = stitchcache.compile_blocks(model, (X, SHIFT), cache=cache, backend="eager")
    assert list(blocks.compiled) == ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]
    assert len(cache.entries()) == 1
    assert {compiled.check.state for compiled in blocks.compiled.values()} == {"agreed"}
    assert differs(model, blocks) == 0.0
    # Weights are the model's own: an update in place is seen.
    with torch.no_grad():
        model.blocks[2].inner.weight.mul_(3.0)
    assert differs(model, blocks) == 0.0
    assert list(model.state_dict()) == names
    blocks.undo()
    assert all("_compiled_call_impl" not in vars(block) for block in model.blocks)


def test_adapters_come_change_and_go(cache, caplog):
    caplog.set_level(logging.INFO, logger="stitchcache")
    model = block_models.model()
    with torch.no_grad():
        plain = model(X, SHIFT)
    blocks = stitchcache.compile_blocks(model, (X, SHIFT), cache=cache, backend="eager")
    seen = []
    for change, compiles in [
        (lambda: block_models.adapt(model, 2, seed=1), True),
        (lambda: block_models.adapt(model, 2, seed=11), False),
        (lambda: block_models.adapt(model, 2, seed=21), False),
        # Only some of the blocks, and a number in a dict.
        (lambda: model.blocks[1].inner.scaling.update(default=2.0), True),
        (lambda: model.blocks[1].inner.scaling.update(default=0.5), False),
        (lambda: block_models.adapt(model, 3, seed=1), True),
        (lambda: block_models.release(model), False),
    ]:
        before = cache.counted().get("compiled", 0)
        caplog.clear()
        change()
        assert differs(model, blocks) == 0.0
        assert (cache.counted().get("compiled", 0) > before) == compiles, caplog.text
        assert "the block has changed; it is looked up again" in caplog.text
        with torch.no_grad():
            seen.append(model(X, SHIFT))
    assert seen[-1].equal(plain)
    assert len({float(result.sum()) for result in seen}) == 6  # the fourth change is undone by the fifth
    assert set(hits(blocks)) <= {None, "direct"}


def test_nothing_is_looked_up_while_nothing_changes(cache, caplog):
    caplog.set_level(logging.INFO, logger="stitchcache")
    model = block_models.model()
    blocks = stitchcache.compile_blocks(model, (X, SHIFT), cache=cache, backend="eager")
    model.blocks[0].inner.weight = torch.nn.Parameter(torch.zeros_like(model.blocks[0].inner.weight))
    assert differs(model, blocks) == 0.0
    caplog.clear()
    for _ in range(3):
        assert differs(model, blocks) == 0.0
    assert not [record for record in caplog.records if record.name == "stitchcache"]


def test_other_shapes_are_compiled_too_and_a_miss_says_why(cache, caplog):
    caplog.set_level(logging.INFO, logger="stitchcache")
    model = block_models.model()
    blocks = stitchcache.compile_blocks(model, (X, SHIFT), cache=cache, backend="eager")
    for _ in range(2):
        assert differs(model, blocks, X[:, :3].contiguous()) == 0.0
        assert differs(model, blocks) == 0.0
    assert "compiled for other arguments: argument x.shape[1]: expected 5, got 3" in caplog.text
    assert len(cache.entries()) == 2
    strict = block_models.model()
    stitchcache.compile_blocks(strict, (X, SHIFT), cache=cache, backend="eager", on_miss="error")
    with pytest.raises(errors.CacheMissError):
        strict(X[:1], SHIFT)


def test_the_next_process_hits_directly(cache, fresh_process):
    source = f"""
        import json, torch, stitchcache
        from api import block_models
        model = block_models.model()
        x, shift = torch.ones(2, 5, 8), torch.ones(8)
        cache = stitchcache.Cache({str(cache.root)!r})
        blocks = stitchcache.compile_blocks(model, (x, shift), cache=cache, backend="eager")
        first = [compiled.cache_hit for compiled in blocks.compiled.values()]
        block_models.adapt(model, 2, seed=1)
        with torch.no_grad():
            model(x, shift)
        print(json.dumps([first, [compiled.cache_hit for compiled in blocks.compiled.values()]]))
    """
    assert fresh_process(source) == [[None] * 4, [None] * 4]
    assert fresh_process(source) == [["direct"] * 4, ["direct"] * 4]


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        (["Nothing"], "has no such blocks"),
        ([torch.nn.Linear(1, 1)], "has no such blocks"),
        ("Block", "blocks is a str"),
        ([], "has no such blocks"),
    ],
)
def test_blocks_that_are_not_there_are_refused(cache, blocks, said):
    with pytest.raises(errors.OptionError, match=said):
        stitchcache.compile_blocks(block_models.model(), (X, SHIFT), cache=cache, blocks=blocks)


def test_blocks_may_be_named_or_given(cache):
    for chosen in (["Block"], None, "list"):
        model = block_models.model()
        given = list(model.blocks)[1:3] if chosen == "list" else chosen
        made = stitchcache.compile_blocks(model, (X, SHIFT), cache=cache, backend="eager", blocks=given)
        assert len(made.blocks) == (2 if chosen == "list" else 4)
        assert differs(model, made) == 0.0


def test_saved_blocks_start_elsewhere_from_a_snapshot_of_the_hub(tmp_path, monkeypatch):
    """The Hub's local cache: a snapshot is a directory of links to blobs."""
    pytest.importorskip("cryptography")
    sign = importlib.import_module("stitchcache.ext.sign")
    monkeypatch.setenv("STITCHCACHE_KEYS", str(tmp_path / "builder"))
    ours = sign.Keys()
    ours.generate("ci@example.com")
    model = block_models.model()
    first = stitchcache.compile_blocks(
        model, (X, SHIFT), cache=stitchcache.Cache(tmp_path / "a"), backend="eager"
    )
    block_models.adapt(model, 2, seed=1)
    with torch.no_grad():
        model(X, SHIFT)
    repository = tmp_path / "hub" / "models--org--dit"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    first.save(snapshot)
    (snapshot / "stitchcache.bundle").rename(repository / "blobs" / "f00d")
    (snapshot / "stitchcache.bundle").symlink_to("../../blobs/f00d")

    monkeypatch.setenv("STITCHCACHE_KEYS", str(tmp_path / "server"))
    cache, model = stitchcache.Cache(tmp_path / "b"), block_models.model()
    start = partial(
        stitchcache.compile_blocks,
        model,
        (X, SHIFT),
        source=snapshot,
        cache=cache,
        backend="eager",
        on_miss="error",
    )
    with pytest.raises(errors.UntrustedEntryError):
        start()
    assert cache.entries() == []
    sign.Keys().trust(importlib.import_module("ext.signing").public(ours), "ci@example.com", {})
    cache = stitchcache.Cache(tmp_path / "b")
    blocks = start(cache=cache)
    assert hits(blocks) == ["direct"] * 4
    block_models.adapt(model, 2, seed=5)
    assert differs(model, blocks) == 0.0
    assert hits(blocks) == ["direct"] * 4
    blocks.undo()
    with pytest.raises(errors.StoreError, match=r"stitchcache\.bundle: cannot be read"):
        start(cache=cache, source=tmp_path)


def test_a_model_that_raises_is_left_as_it_was(cache):
    """The first blocks run compiled by then; Ctrl-C is no Exception."""
    model = block_models.model()

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.blocks[-1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        stitchcache.compile_blocks(model, (X, SHIFT), cache=cache, backend="eager")
    handle.remove()
    assert len(cache.entries()) == 1
    assert all("_compiled_call_impl" not in vars(block) for block in model.blocks)
    assert not any(block._forward_pre_hooks for block in model.blocks)


def test_blocks_that_run_compiled_are_not_compiled_again(cache):
    model = block_models.model()
    blocks = stitchcache.compile_blocks(model, (X, SHIFT), cache=cache, backend="eager")
    with pytest.raises(errors.OptionError, match=r"blocks\.0, .* run compiled already\. Call undo\(\)"):
        stitchcache.compile_blocks(model, (X, SHIFT), cache=cache, backend="eager")
    # The blocks go on as they were.
    assert all("_compiled_call_impl" in vars(block) for block in model.blocks)
    assert differs(model, blocks) == 0.0
    blocks.undo()
    again = stitchcache.compile_blocks(model, (X, SHIFT), cache=cache, backend="eager")
    assert differs(model, again) == 0.0
