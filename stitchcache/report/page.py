"""Pages: one HTML file each, which needs no network and runs no script but those that it names by digest."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from stitchcache.errors import StoreError
from stitchcache.explanation import printable
from stitchcache.html import Markup, shown, tag

_EXPORT = re.compile(r"export\{[^}]*?\b(\w+) as Graphviz\b[^}]*\};?\s*(?://.*)?\s*$")


def page(title: str, *content: Markup, data: Any = None) -> str:
    """A whole page; with ``data`` for its scripts, it draws a graph."""
    style = asset("page.css")
    # Other modules cannot be imported from a page that is a file: Graphviz becomes one of its globals.
    graphviz = "" if data is None else _EXPORT.sub(r"globalThis.Graphviz=\1;", asset("graphviz.js"))
    scripts = [] if data is None else [graphviz, asset("entry.js")]
    # Nothing else is run, and nothing is fetched, whatever an entry may say.
    allowed = [f"'{_digest(script)}'" for script in scripts]
    allowed += ["'wasm-unsafe-eval'"] if scripts else ["'none'"]
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src {' '.join(allowed)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{shown(policy)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">',
        f"<title>{shown(title)}</title><style>{style}</style></head><body>",
        tag("main", *content),
    ]
    if data is not None:
        text = json.dumps(_visible(data), separators=(",", ":")).replace("<", "\\u003c")
        parts.append(f'<script type="application/json" id="data">{text}</script>')
    parts += [f'<script type="module">{script}</script>' for script in scripts]
    return "\n".join([*parts, "</body></html>\n"])


def write_page(path: str, text: str) -> None:
    """Write a page in one go; a StoreError if it cannot be written."""
    target = Path(path)
    try:
        if target.exists() and not target.is_file():
            # A pipe or a terminal.
            target.write_text(text, encoding="utf-8", errors="backslashreplace")
            return
        temporary = target.with_name(f".{target.name}.{os.urandom(8).hex()}")
        try:
            with temporary.open("x", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StoreError(f"{path}: cannot be written ({reason}); name another file", path=path) from error


def asset(name: str) -> str:
    """A file that pages are made of."""
    return Path(__file__).with_name("assets").joinpath(name).read_text("utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _visible(data: Any) -> Any:
    if isinstance(data, str):
        return printable(data)
    if isinstance(data, dict):
        return {printable(key): _visible(value) for key, value in data.items()}
    return [_visible(value) for value in data] if isinstance(data, (list, tuple)) else data
