"""Compile one piece with Inductor: the compiler it needs, the options it gets, the file it becomes."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node

from stitchcache.errors import BackendError, CompilerMissingError
from stitchcache.graph.symbols import finite
from stitchcache.torchside import inductor
from stitchcache.torchside.ops import OpOverload, is_view, known_range

ENOUGH = 32768
"""Elements that its largest tensor can have from which a piece's loops are shared among threads: ATen's own
grain size. Waking a thread takes longer than the loops of a smaller piece do."""

# How deep Inductor cuts loops up; how many threads there are is asked when they run.
_NOMINAL_THREADS = 8

HEADERS = "aot_inductor.precompile_headers"
HEADERS_PAY_FROM = 6
"""Pieces from which precompiled headers pay: the first piece makes both, which takes one core 10 s once on a
machine, and each piece compiles 2 s sooner."""


def find_compiler() -> str | None:
    """Path of the C++ compiler that Inductor takes: ``CXX`` if it is set, else the platform's."""
    return shutil.which(_wanted_compiler())


def _wanted_compiler() -> str:
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def require_compiler(backend: str) -> None:
    """Check that there is a C++ compiler.

    Raises:
        CompilerMissingError: There is none; says what to install.
    """
    if find_compiler() is None:
        raise CompilerMissingError(
            f"backend={backend!r} needs a C++ compiler and found no {_wanted_compiler()} on PATH. Install "
            "one (Debian, Ubuntu: 'apt install g++'; Fedora: 'dnf install gcc-c++'; conda: 'cxx-compiler'), "
            "point CXX at it, or use backend='eager'. Loading what is cached needs no compiler.",
            backend=backend,
        )


def header_options(devices: Collection[str], pieces: int) -> dict[str, Any]:
    """Whether pieces are compiled with precompiled headers, which torch makes unless it is told not to."""
    known = hasattr(inductor.settings().aot_inductor, "precompile_headers")
    # What accelerators make of headers was not measured: they are left to torch.
    return {HEADERS: False} if known and set(devices) == {"cpu"} and pieces < HEADERS_PAY_FROM else {}


def build_library(piece: GraphModule, directory: Path, options: Mapping[str, Any]) -> Path:
    """Compile a piece with AOTInductor.

    Args:
        piece: Its placeholders carry fake tensors in ``meta["val"]``; it returns a tuple.
        directory: An empty directory to work in.
        options: As ``torch.compile(options=...)`` takes them.

    Returns:
        The library.

    Raises:
        BackendError: It cannot be compiled, or not to one file.
    """
    # Debug sections are two thirds of a small library, all of which a warm start reads and digests.
    debug = "aot_inductor.enable_line_tables"
    asked = "AOT_INDUCTOR_ENABLE_LINE_TABLES" in os.environ
    known = getattr(inductor.settings().aot_inductor, "enable_line_tables", False)
    chosen = {
        **thread_options(piece, options),
        **({debug: False} if known and not asked else {}),
        **options,
        # Beside the library a kernel would be lost: one file is stored.
        "aot_inductor.embed_kernel_binary": True,
        "aot_inductor.output_path": str(directory / "piece.so"),
    }
    built = inductor.compile_library(piece, _fakes(piece), chosen)
    if not isinstance(built, str) or not Path(built).is_file():
        raise BackendError(
            f"AOTInductor returned {built!r} instead of the path of a library. "
            "Remove options that change what it produces (aot_inductor.package*).",
            backend="aoti",
        )
    proxies = _proxies(directory)
    if proxies:
        raise BackendError(
            f"AOTInductor has no C++ entry for {', '.join(proxies)} and wants to call it through a "
            "proxy, which stitchcache does not store. Name it in splitting_ops, or use "
            "backend='inductor' or 'eager'.",
            backend="aoti",
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


def build_artifact(piece: GraphModule, directory: Path, options: Mapping[str, Any]) -> Path:
    """Compile a piece with Inductor; see :func:`build_library`."""
    path = directory / "piece.inductor"
    inductor.compile_artifact(piece, _fakes(piece), {**thread_options(piece, options), **options}, path)
    return path


def _fakes(piece: GraphModule) -> list[Any]:
    return [node.meta["val"] for node in piece.graph.nodes if node.op == "placeholder"]


def thread_options(piece: GraphModule, options: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's options for the threads of a piece: as many as torch has in the process that calls it.

    Inductor writes the number of threads of the compiling process into its C++, and leaves parallel loops out
    where that is one. Our children compile on one thread each, and a prewarmed image runs on other machines.
    So a piece that can be given enough work asks for the number when it runs, and one that is always small
    runs on a single thread. What it can be given is what its sizes' ranges allow. The example does not count:
    it is in no key, so whoever compiled first would decide for all others.

    Args:
        piece: Its nodes carry fake tensors in ``meta["val"]``; a size that may vary counts as the largest
            that the capture allows.
        options: The user's own; what they say of threads is left alone.
    """
    if {"cpp.threads", "cpp.dynamic_threads"} & options.keys() or inductor.settings().cpp.threads > 0:
        return {}
    if _largest(piece) < ENOUGH:
        return {"cpp.threads": 1}
    return {"cpp.threads": _NOMINAL_THREADS, "cpp.dynamic_threads": True}


def _largest(piece: GraphModule) -> int:
    """Elements of the largest tensor that a piece can compute: not of its weights, nor of views."""
    found = 0
    for node in piece.graph.nodes:
        if node.op == "call_function" and not _is_view(node):
            value = node.meta.get("val")
            for item in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(item, torch.Tensor):
                    found = max(found, math.prod(_most(size) for size in item.shape))
    return found


def _is_view(node: Node) -> bool:
    return not isinstance(node.target, OpOverload) or is_view(node.target)


def _most(size: int | torch.SymInt) -> int:
    if not isinstance(size, torch.SymInt):
        return size
    top = finite(known_range(size)[1])
    # Without a bound, or where only data decides, it may be large.
    return ENOUGH if top is None else top
