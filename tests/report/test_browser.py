"""The page in a real browser, where there is one: ``pip install playwright`` and Debian's ``chromium``.

With ``axe-playwright-python`` axe-core looks at it too.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from stitchcache.cache import Cache
from stitchcache.report.drawing import entry_page
from stitchcache.report.entry import read_entry

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))
from cli_entries import artifact, key

sync = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def decoder(layers: int) -> str:
    """Stitching code of a decoder with so many layers."""
    names = [f"submod_{2 * at}" for at in range(layers + 1)]
    lines = ["def bind(__submods__, __consts__):", f"    {', '.join(names)} = __submods__"]
    lines += ["    op_attention = torch.ops.demo.attention.default", "", "    def execution_fn(ids):"]
    lines += ["        (q, k, rest, mask) = submod_0([ids])  # 3 x float32[s0, s1, 64], bool[s0, s1]"]
    lines += ["        del ids"]
    for name in names[1:]:
        lines += ["        a = op_attention(q, k, mask)", "        del q, k"]
        lines += [f"        (q, k, rest) = {name}([a, rest])  # 3 x float32[s0, s1, 64]", "        del a"]
    return "\n".join([*lines, "        return (rest,)", "", "    return execution_fn", ""])


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with (
        sync.sync_playwright() as play,
        play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as b,
    ):
        yield b


def opened(browser, path):
    """A tab with a page, and what it said and asked for."""
    tab = browser.new_page()
    tab.said, tab.asked = [], []
    tab.on("console", lambda message: tab.said.append(message.text))
    tab.on("pageerror", lambda error: tab.said.append(str(error)))
    tab.on("request", lambda request: tab.asked.append(request.url))
    tab.goto(path.as_uri())
    tab.wait_for_function("document.documentElement.dataset.drawn", timeout=60_000)
    return tab


def barriers(tab):
    """What axe-core finds that keeps people from using a page."""
    axe = pytest.importorskip("axe_playwright_python", reason="needs the package axe-playwright-python")
    tab.evaluate(Path(axe.__file__).with_name("axe.min.js").read_text())
    found = tab.evaluate("axe.run()")["violations"]
    return [
        (each["id"], [node["html"] for node in each["nodes"]])
        for each in found
        if each["impact"] in ("serious", "critical")
    ]


@pytest.fixture(scope="module")
def shown(browser, tmp_path_factory):
    from dataclasses import replace

    root = tmp_path_factory.mktemp("cache")
    cache = Cache(root)
    made = artifact(cache, key("a"), "<b>Llama</b>\x1b[31m")
    first, _, last = made.pieces
    pieces = [replace(last, name=f"submod_{2 * at}") for at in range(33)]
    pieces[0] = first
    variant = replace(
        made.variants[0],
        code=decoder(32),
        submod_names=tuple(piece.name for piece in pieces),
        pieces=tuple(pieces),
    )
    cache.put(replace(made, variants=(variant,)))
    path = root / "page.html"
    path.write_text(entry_page(cache, read_entry(cache, key("a"))))
    assert path.stat().st_size < 1_500_000
    return opened(browser, path)


def test_it_is_drawn_without_a_word_or_a_request(shown):
    # Folded: the input, the first piece, the op and the piece that repeat, the result.
    assert shown.locator(".node").count() == 5
    assert "piece B \u00d732" in shown.locator("#drawing").text_content()
    assert shown.locator("h1").text_content() == "<b>Llama</b>\\x1b[31m"
    assert shown.said == []
    assert len(shown.asked) == 1


def test_steps_are_chosen_by_mouse_and_keyboard(shown):
    shown.locator(".node", has_text="submod_0").click()
    assert shown.locator("#detail h3").inner_text() == "submod_0"
    assert shown.evaluate("location.hash") == "#v0s1"
    shown.keyboard.press("ArrowDown")
    shown.keyboard.press("Enter")
    shown.wait_for_function("location.hash === '#v0s2'")
    assert "attention" in shown.locator("#detail h3").inner_text()
    shown.go_back()
    shown.wait_for_function("document.querySelector('#detail h3').textContent === 'submod_0'")


def test_code_and_steps_lead_to_each_other(shown):
    shown.locator("a.line", has_text="submod_64([").click()
    shown.wait_for_function("document.querySelector('#detail h3').textContent === 'submod_64'")
    assert shown.locator(".line.chosen").count() == 1
    shown.locator("#detail a", has_text="of the code").click()
    assert shown.evaluate("location.hash").startswith("#v0L")


def test_memory_follows_the_sizes(shown):
    assert "At most" in shown.locator("#unknown").inner_text()
    shown.locator("#sizes input").first.fill("1")
    shown.locator("#sizes input").last.fill("2")
    # Three tensors of 512 bytes and the mask; of what the op makes, nothing is known.
    assert shown.locator("#unknown").inner_text() == "At most 1.5 KiB. 32 values are of unknown size."
    assert "1.5 KiB" in shown.locator("#held title").nth(1).text_content()
    assert "KiB" in shown.locator("#held").get_attribute("aria-label")


def test_axe_finds_nothing_serious(shown):
    assert barriers(shown) == []


@pytest.mark.skipif(os.environ.get("STITCHCACHE_FULL") != "1", reason="captures models: STITCHCACHE_FULL=1")
@pytest.mark.parametrize("name", ["decoder", "minilm", "llama"])
def test_a_real_model(browser, tmp_path, name):
    """The decoder of the tests, all-MiniLM-L6-v2 and a Llama of 32 layers, light and dark."""
    import stitchcache

    model, args, how = real(name)
    cache = Cache(tmp_path / "cache")
    made = stitchcache.compile(model, args, cache=cache, **{**how, "backend": "eager"})
    path = tmp_path / "page.html"
    path.write_text(entry_page(cache, read_entry(cache, made.graph_hash)))
    print(f"{name}: {path.stat().st_size} bytes")
    assert path.stat().st_size < 1_500_000
    tab = opened(browser, path)
    tab.locator(".node").nth(1).click()
    assert tab.locator("#detail h3").inner_text()
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        assert barriers(tab) == []
        tab.screenshot(path=tmp_path / f"{scheme}.png", full_page=True)
    assert tab.said == []
    assert len(tab.asked) == 1


def real(name):
    import models
    import torch

    if name == "decoder":
        return models.decoder(), (models.ids(),), models.decoder_options()
    transformers = pytest.importorskip("transformers")
    how = {"splitting_ops": ["aten::scaled_dot_product_attention"]}
    if name == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 32, "vocab_size": 64}
        config = transformers.LlamaConfig(**sizes, num_attention_heads=2, use_cache=False)
        return transformers.LlamaForCausalLM(config).eval(), (torch.zeros(1, 8, dtype=torch.long),), how
    sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "examples"))
    try:
        import minilm
    finally:
        sys.path.pop(0)

    model, args, kwargs = minilm.build()
    return model, args, {**how, "kwargs": kwargs, "dynamic_shapes": minilm.target.dynamic_shapes}


def test_unfolded_and_zoomed(shown):
    shown.locator("#fold").uncheck()
    assert shown.locator(".node").count() == 67
    # What all layers read would cross everything: it is named where it is read.
    assert shown.locator("#drawing").text_content().count("\u2190 submod_0") == 26
    assert shown.locator(".edge.far.lit").count() == 0
    before = shown.locator("#drawing").get_attribute("viewBox")
    shown.locator("#in").click()
    assert shown.locator("#drawing").get_attribute("viewBox") != before
    assert shown.said == []
