"""Pages: one HTML file each, which needs no network and runs no script but those that it names by digest."""

from __future__ import annotations

import hashlib
import os
import re
from binascii import b2a_base64
from contextlib import suppress
from typing import Any

from stitchcache.errors import StoreError, printable
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
        import json

        text = json.dumps(_visible(data), separators=(",", ":")).replace("<", "\\u003c")
        parts.append(f'<script type="application/json" id="data">{text}</script>')
    parts += [f'<script type="module">{script}</script>' for script in scripts]
    return "\n".join([*parts, "</body></html>\n"])


def write_page(path: str, text: str) -> None:
    """Write a page in one go; a StoreError if it cannot be written."""
    target = path.rstrip(os.sep) or os.path.normpath(path)
    directory, name = os.path.split(target)
    # A pipe or a terminal is written to.
    whole = not os.path.exists(target) or os.path.isfile(target)
    place = os.path.join(directory, f".{name}.{os.urandom(8).hex()}") if whole else target
    try:
        try:
            with open(place, "x" if whole else "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            if whole:
                os.replace(place, target)
        finally:
            if whole:
                with suppress(FileNotFoundError):
                    os.unlink(place)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StoreError(f"{path}: cannot be written ({reason}); name another file", path=path) from error


def asset(name: str) -> str:
    """A file that pages are made of."""
    with open(os.path.join(os.path.dirname(__file__), "assets", name), encoding="utf-8") as file:
        return file.read()


def _digest(text: str) -> str:
    return "sha256-" + b2a_base64(hashlib.sha256(text.encode()).digest(), newline=False).decode()


def _visible(data: Any) -> Any:
    if isinstance(data, str):
        return printable(data)
    if isinstance(data, dict):
        return {printable(key): _visible(value) for key, value in data.items()}
    return [_visible(value) for value in data] if isinstance(data, (list, tuple)) else data
