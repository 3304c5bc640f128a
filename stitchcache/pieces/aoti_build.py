"""Compile a piece with AOTInductor; loading is in ``aoti``, as a warm start builds nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from stitchcache.errors import BackendError
from stitchcache.pieces import inductor_process
from stitchcache.pieces.threads import thread_options
from stitchcache.torchside import headers, inductor


def warm(devices: Collection[str], options: Mapping[str, Any], before: int) -> None:
    """Leave the probes of the CPU on disk, and the precompiled headers if they are worth it."""
    inductor_process.probe(devices, options)
    if "cpu" in devices and headers.worth(options, before, 0):
        with inductor_process.settled(devices, options), inductor.settings().patch(settings(options)):
            headers.precompile()


def tuned(
    devices: Collection[str], options: Mapping[str, Any], before: int, pieces: int
) -> Mapping[str, Any]:
    """The user's options, and what suits the number of pieces."""
    known = hasattr(inductor.settings().aot_inductor, "precompile_headers")
    # What accelerators make of headers was not measured: they are left to torch.
    if not known or set(devices) != {"cpu"} or headers.worth(options, before, pieces):
        return options
    return {**options, headers.OPTION: False}


def settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """The user's options, and what ours are."""
    # Debug sections are two thirds of a small library, all of which a warm start reads and digests.
    asked = "AOT_INDUCTOR_ENABLE_LINE_TABLES" in os.environ
    lines = getattr(inductor.settings().aot_inductor, "enable_line_tables", False) and not asked
    ours = {"aot_inductor.enable_line_tables": False} if lines else {}
    return {**ours, **options, "aot_inductor.embed_kernel_binary": True}


def build(piece: torch.fx.GraphModule, directory: Path, options: Mapping[str, Any], backend: str) -> Path:
    """Compile a piece.

    Args:
        piece: Its placeholders carry fake tensors in ``meta["val"]``; it returns a tuple.
        directory: An empty directory to work in.
        options: As ``torch.compile(options=...)`` takes them.
        backend: The backend's name, for errors.

    Returns:
        The library.

    Raises:
        BackendError: It cannot be compiled, or not to one file.
    """
    fakes = [node.meta["val"] for node in piece.graph.nodes if node.op == "placeholder"]
    chosen = {
        **thread_options(piece, options),
        **settings(options),
        "aot_inductor.output_path": str(directory / "piece.so"),
    }
    built = inductor.compile_library(piece, fakes, chosen)
    if not isinstance(built, str) or not Path(built).is_file():
        raise BackendError(
            f"AOTInductor returned {built!r} instead of the path of a library. "
            "Remove options that change what it produces (aot_inductor.package*).",
            backend=backend,
        )
    proxies = _proxies(directory)
    if proxies:
        raise BackendError(
            f"AOTInductor has no C++ entry for {', '.join(proxies)} and wants to call it through a "
            "proxy, which stitchcache does not store. Name it in splitting_ops, or use "
            "backend='inductor' or 'eager'.",
            backend=backend,
        )
    return Path(built)


def _proxies(directory: Path) -> list[str]:
    """Ops that a freshly built library would look up in a file beside it."""
    found: dict[str, None] = {}
    for path in sorted(directory.rglob("*.json")):
        record = json.loads(path.read_text())
        # Of the other files of this kind that Inductor leaves, none lists nodes.
        for entry in record.get("nodes", []) if isinstance(record, dict) else []:
            target = str(entry.get("node", {}).get("target", entry.get("name", "an op")))
            found[target.removeprefix("torch.ops.").replace(".", "::", 1)] = None
    return list(found)
