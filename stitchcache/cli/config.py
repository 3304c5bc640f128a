"""``stitchcache config``: every setting, its value, and where that came from."""

from __future__ import annotations

import os
from dataclasses import dataclass

import click

from stitchcache.cli.layout import Column
from stitchcache.cli.options import cache_option, json_option, open_cache
from stitchcache.cli.output import print_json, print_table
from stitchcache.cli.words import size_text


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting as it stands.

    Args:
        name: What it is about.
        value: Its value; ``None`` is no limit.
        shown: The same for people.
        source: ``default``, ``environment`` or ``option``.
        variable: The environment variable that sets it.
    """

    name: str
    value: str | int | bool | None
    shown: str
    source: str
    variable: str


@click.command()
@json_option
@cache_option
def command(as_json: bool, root: str | None) -> None:
    """Show each setting, its value and where it came from."""
    settings = _settings(root)
    if as_json:
        print_json(
            {
                "settings": {
                    s.name: {"value": s.value, "source": s.source, "variable": s.variable} for s in settings
                }
            }
        )
        return
    columns = (Column("SETTING"), Column("VALUE"), Column("FROM"), Column("VARIABLE"))
    print_table(columns, [[s.name, s.shown, s.source, s.variable] for s in settings])


def _settings(root: str | None) -> list[Setting]:
    from stitchcache.store.layout import CHECKS, choice, flag, required

    cache = open_cache(root)
    limit = cache.max_bytes
    require, check = required(), choice("STITCHCACHE_CHECK", CHECKS)
    value, shown = {"nothing": (False, "no"), "hit": (True, "yes")}.get(require, (require, require))
    return [
        Setting(
            "root", str(cache.root), str(cache.root), _source("STITCHCACHE_DIR", root), "STITCHCACHE_DIR"
        ),
        Setting(
            "max_size",
            limit,
            "no limit" if limit is None else size_text(limit),
            _source("STITCHCACHE_MAX_SIZE"),
            "STITCHCACHE_MAX_SIZE",
        ),
        Setting("require", value, shown, _source("STITCHCACHE_REQUIRE"), "STITCHCACHE_REQUIRE"),
        Setting("check", check, check, _source("STITCHCACHE_CHECK"), "STITCHCACHE_CHECK"),
        *(
            Setting(name, flag(variable), "yes" if flag(variable) else "no", _source(variable), variable)
            for name, variable in (
                ("read_only", "STITCHCACHE_READONLY"),
                ("audit", "STITCHCACHE_AUDIT"),
                ("debug", "STITCHCACHE_DEBUG"),
            )
        ),
    ]


def _source(variable: str, option: str | None = None) -> str:
    if option is not None:
        return "option"
    return "environment" if os.environ.get(variable, "").strip() else "default"
