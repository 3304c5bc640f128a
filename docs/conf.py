"""Makes a site of these pages: ``pip install -e '.[docs]'`` and ``sphinx-build -W docs site``."""

from __future__ import annotations

import click
from sphinx.application import Sphinx

import stitchcache

project = "stitchcache"
release = stitchcache.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
html_theme = "furo"
html_title = f"stitchcache {release}"
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
# Long signatures take a line for each parameter.
maximum_signature_line_length = 100
# Pages show JSON and entries in blocks that highlighters do not know.
suppress_warnings = ["misc.highlighting_failure"]


def _reference() -> str:
    lines = ["# API reference", "", "Made from the docstrings. [The API page](api.md) explains.", ""]
    for name in sorted(stitchcache.__all__):
        if name.startswith("_") or name == "errors":
            continue
        kind = "autoclass" if isinstance(getattr(stitchcache, name), type) else "autofunction"
        members = ["   :members:"] if kind == "autoclass" else []
        lines += [f"## {name}", "", "```{eval-rst}", f".. {kind}:: stitchcache.{name}", *members, "```", ""]
    errors = ["```{eval-rst}", ".. automodule:: stitchcache.errors", "   :members:", "```"]
    return "\n".join([*lines, "## errors", "", *errors, ""])


def _commands() -> str:
    from stitchcache.cli import commands

    lines = ["# Commands", "", "Made from the commands themselves. [Command line](cli.md) explains.", ""]
    with click.Context(commands, info_name="stitchcache") as above:
        for name in commands.list_commands(above):
            command = commands.get_command(above, name)
            with click.Context(command, info_name=name, parent=above, max_content_width=90) as here:
                lines += [f"## {name}", "", "```text", command.get_help(here), "```", ""]
    return "\n".join(lines)


def setup(app: Sphinx) -> None:
    made = {"reference": _reference, "commands": _commands}

    def write(_app: Sphinx, page: str, source: list[str]) -> None:
        if page in made:
            source[0] = made[page]()

    app.connect("source-read", write)
