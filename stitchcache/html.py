"""HTML made of text that nobody vouches for: all of it is escaped, and what cannot be seen is shown."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from functools import lru_cache

from stitchcache.errors import visible


class Markup(str):
    """HTML that was made here, and is not escaped again."""

    __slots__ = ()


def shown(value: object) -> str:
    """A value as text of a page; line breaks are shown as ``\\n``."""
    if isinstance(value, Markup):
        return value
    return html.escape(visible(str(value)).replace("\n", "\\n"))


def tag(name: str, *content: object, **attributes: str) -> Markup:
    """An element; ``class_`` stands for ``class``, ``aria_label`` for ``aria-label``."""
    given = "".join(f' {k.rstrip("_").replace("_", "-")}="{shown(value)}"' for k, value in attributes.items())
    return Markup(f"<{name}{given}>{''.join(map(shown, content))}</{name}>")


def facts(pairs: Iterable[tuple[str, object]]) -> Markup:
    """Names and values below each other."""
    rows = [tag("tr", tag("th", name, scope="row"), tag("td", value)) for name, value in pairs]
    return tag("table", *rows, class_="facts")


def table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> Markup:
    """Rows under titles."""
    head = tag("tr", *[tag("th", title, scope="col") for title in titles])
    # Not by ``tag``: there may be thousands of rows, in which little is different.
    text = lru_cache(None, typed=True)(shown)
    body = "".join([f"<tr>{''.join([f'<td>{text(cell)}</td>' for cell in row])}</tr>" for row in rows])
    return tag("table", tag("thead", head), tag("tbody", Markup(body)))
