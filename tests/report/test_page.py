"""Pages: what they may do, and that text of an entry stays text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from stitchcache.cache import Cache
from stitchcache.errors import StoreError
from stitchcache.report.drawing import entry_page
from stitchcache.report.entry import read_entry
from stitchcache.report.page import page, write_page

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))
from cli_entries import artifact, key

HOSTILE = "</script><img src=x onerror=alert(1)>\x1b[31m\u202e'\"&"


def made(root, **changes):
    cache = Cache(root)
    cache.put(replace(artifact(cache, key("a")), **changes))
    return entry_page(cache, read_entry(cache, key("a")))


def test_text_of_an_entry_is_text(tmp_path):
    text = made(tmp_path, label=HOSTILE)
    assert "<img" not in text
    assert text.count("</script>") == 3
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert json.loads(re.search(r'id="data">(.*?)</script>', text)[1])["variants"]


def test_only_scripts_of_the_policy_run(tmp_path):
    text = made(tmp_path)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1].replace("&#x27;", "'")
    assert policy.startswith("default-src 'none'")
    assert "unsafe-inline" not in policy
    for inside in re.findall(r'<script type="module">(.*?)</script>|<style>(.*?)</style>', text, re.S):
        digest = base64.b64encode(hashlib.sha256("".join(inside).encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert not re.search(r'(?:src|href)="(?!#|data:,)', text)


def test_a_page_without_data_has_no_script():
    text = page("Report")
    assert "<script" not in text
    assert "script-src &#x27;none&#x27;" in text


def test_graphviz_is_the_package_unchanged():
    path = Path(sys.modules["stitchcache.report.page"].__file__).parent / "assets" / "graphviz.js"
    # Of dist/index.js of the npm package that README.md beside it names.
    assert hashlib.sha256(path.read_bytes()).hexdigest() == (
        "550d9cd6ff429f5bd225316fe1faed4f852038c3e1ec609ce113af1f9379ce25"
    )


def test_everything_is_readable_without_scripts(tmp_path):
    text = made(tmp_path)
    for part in ("batch[&#x27;mask&#x27;]", "head.weight", "env.torch", "s0 &lt;= 2*s1", "execution_fn"):
        assert part in text, part


def test_code_that_cannot_be_read_is_shown_all_the_same(tmp_path):
    cache = Cache(tmp_path)
    variants = artifact(cache, key("a")).variants
    for code in ("def broken(:\n", "x = " + "(" * 5000, "pass\n"):
        text = made(tmp_path / key(code)[:8], variants=(replace(variants[0], code=code),))
        assert "the code cannot be read" in text


def test_a_page_is_written_whole_or_not(tmp_path):
    with pytest.raises(StoreError, match="cannot be written"):
        write_page(str(tmp_path / "missing" / "page.html"), "text")
    (tmp_path / "page.html").write_text("old")
    write_page(str(tmp_path / "page.html"), "new \udcff")
    assert (tmp_path / "page.html").read_text() == "new \\udcff"
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
