"""Options that every command has, and the cache that they name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from stitchcache.cache import Cache

F = TypeVar("F", bound=Callable[..., Any])


def cache_option(function: F) -> F:
    """Add ``--cache``."""
    return click.option(
        "--cache",
        "root",
        metavar="DIR",
        help="The cache's directory.  [default: STITCHCACHE_DIR, or the user's cache directory]",
    )(function)


def json_option(function: F) -> F:
    """Add ``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


def open_cache(root: str | None) -> Cache:
    """The cache that ``--cache`` names.

    Raises:
        OptionError: An environment variable makes no sense.
        StoreError: The directory is something else.
    """
    from stitchcache.cache import Cache

    return Cache(root)


def finding() -> None:
    """End the command with exit status 1."""
    click.get_current_context().exit(1)
