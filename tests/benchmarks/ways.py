"""Every way to run a model that is compared: what it leaves on disk, and how the next process starts from it.

Each way is two functions over a model: ``prepare`` compiles in a process that has nothing and leaves its
files in a directory, ``load`` starts from them. Both return what is called like the model. Settings are
torch's defaults but for what is said here; rows and tokens are dynamic in every way, splitting ops are the
same for the two ways that split.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from subjects import Subject

Call = Callable[..., Any]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

EAGER, OURS, COMPILE, MEGA = "eager", "stitchcache", "compile", "mega"
AOT, PACKAGE, VLLM = "aot_compile", "package", "vllm"
IMPORTED, PRELOADED, WHOLE = "imported", "preloaded", "whole"
UNCHECKED, BACKGROUND, RUNNER = "unchecked", "background", "runner"
WAYS = (EAGER, OURS, UNCHECKED, BACKGROUND, IMPORTED, PRELOADED, WHOLE, COMPILE, MEGA, AOT, PACKAGE, VLLM)
ALL = (*WAYS, RUNNER)
"""With what only a comparison of calls asks for: our stitching code over torch's own runner."""
LABELS = {
    EAGER: "eager",
    OURS: "stitchcache",
    UNCHECKED: "stitchcache, check=none",
    BACKGROUND: "stitchcache, check=background",
    IMPORTED: "stitchcache, imported first",
    PRELOADED: "stitchcache, preloaded",
    WHOLE: "stitchcache, not split",
    COMPILE: "torch.compile",
    MEGA: "mega-cache",
    AOT: "aot_compile",
    PACKAGE: "AOTInductor package",
    VLLM: "vLLM's way",
    RUNNER: "stitchcache, torch's runner",
}
"""What tables and plots call them."""
PREPARED_BY = {MEGA: COMPILE} | dict.fromkeys((IMPORTED, PRELOADED, UNCHECKED, BACKGROUND, RUNNER), OURS)
"""The artifacts of the mega-cache are saved at the end of torch.compile's own cold process; our ways start
from one cache."""
IN_TURN = (OURS, UNCHECKED, BACKGROUND, PRELOADED)
"""Our ways whose imports are measured apart: the others have them behind them, or none."""
EMPTY_INDUCTOR = (MEGA,)
"""Ways that get an empty Inductor directory in every process: all they need is in their file."""


def prepare(way: str, subject: Subject, model: Any, inputs: Inputs, directory: Path) -> Call:
    """Compile in a process that has nothing.

    Args:
        way: One of ``WAYS``.
        subject: What the model is.
        model: The model.
        inputs: Example arguments; the first call gets the same.
        directory: Where files are left.
    """
    return _PREPARE[way](subject, model, inputs, directory)


def after_first_call(way: str, directory: Path) -> None:
    """What is left for later that is known only after the first call: the mega-cache's file."""
    if way == COMPILE:
        import torch

        saved = torch.compiler.save_cache_artifacts()
        if saved is None:
            raise SystemExit("torch.compile left no cache artifacts")
        (directory / "mega.bin").write_bytes(saved[0])


def before_build(way: str, directory: Path) -> Any:
    """What a way does before the model is built: our imports, or a thread that reads ahead."""
    if way == IMPORTED:
        import_ours()
    if way != PRELOADED:
        return None
    import stitchcache

    cache = stitchcache.Cache(directory / "cache")
    # A directory that an older version prepared may hold its entry too.
    entry = max(cache.entries(), key=lambda header: header.created)
    return stitchcache.preload(entry.graph_hash, cache=cache)


def import_ours() -> None:
    """What ``from stitchcache import compile`` at the top of a program does."""
    import stitchcache

    # Looked up lazily: this is what imports them.
    _ = stitchcache.compile, stitchcache.Cache, stitchcache.Dim


def load(way: str, subject: Subject, model: Any, inputs: Inputs, directory: Path, begun: Any = None) -> Call:
    """Start from what :func:`prepare` left; arguments likewise, and what :func:`before_build` returned."""
    if begun is not None:
        return stitched(subject, model, inputs, directory, preloaded=begun)
    return _LOAD[way](subject, model, inputs, directory)


def _eager(subject: Subject, model: Any, inputs: Inputs, directory: Path) -> Call:
    return model  # type: ignore[no-any-return]


def stitched(
    subject: Subject,
    model: Any,
    inputs: Inputs,
    directory: Path,
    backend: str = "aoti",
    preloaded: Any = None,
    split: bool = True,
    check: str = "example",
) -> Call:
    """``stitchcache.compile``, cold and warm alike; not split, the whole model is one piece."""
    import stitchcache

    return stitchcache.compile(
        model,
        *inputs,
        dynamic_shapes=subject.dynamic_shapes(stitchcache.Dim),
        splitting_ops=subject.splitting_ops if split else (),
        backend=backend,
        cache=stitchcache.Cache(directory / "cache") if preloaded is None else preloaded.cache,
        preloaded=preloaded,
        check=check,
    )


def _with_runner(subject: Subject, model: Any, inputs: Inputs, directory: Path) -> Call:
    """The same entry, its pieces called by torch's ``AOTIModelContainerRunner``, which holds the GIL."""
    import stitchcache
    from stitchcache.runtime.model import CompiledModel
    from stitchcache.torchside import load_with_runner

    compiled: Any = stitched(subject, model, inputs, directory, check="none")
    cache, pieces = stitchcache.Cache(directory / "cache"), dict(compiled._pieces)
    for piece in {piece.key: piece for piece in compiled.artifact.pieces if piece.backend == "aoti"}.values():
        pieces[piece.key] = load_with_runner(str(cache.blob_path(piece.blob)), subject.device)
    return CompiledModel(compiled.artifact, model, pieces, compiled._constants)


def _compile(subject: Subject, model: Any, inputs: Inputs, directory: Path) -> Call:
    import torch

    mark_dynamic(inputs)
    return torch.compile(model)  # type: ignore[no-any-return]


def mark_dynamic(inputs: Inputs) -> None:
    """Rows and tokens vary: without it torch.compile compiles for the first sizes and again for others.

    ``dynamic=True`` would make Python floats symbolic too, which ``aot_compile`` cannot take.
    """
    import torch._dynamo

    for tensor in (*inputs[0], *inputs[1].values()):
        torch._dynamo.maybe_mark_dynamic(tensor, [0, 1])


def _load_mega(subject: Subject, model: Any, inputs: Inputs, directory: Path) -> Call:
    import torch

    if torch.compiler.load_cache_artifacts((directory / "mega.bin").read_bytes()) is None:
        raise SystemExit("the mega-cache cannot be loaded")
    return _compile(subject, model, inputs, directory)


def _prepare_aot(subject: Subject, model: Any, inputs: Inputs, directory: Path) -> Call:
    import torch

    model = _with_plain_results(subject, model)
    mark_dynamic(inputs)
    # Some guards on transformers' models cannot be saved; vLLM drops them all too.
    unguarded = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    compiled: Any = torch.compile(model, fullgraph=True, options=unguarded)
    with torch.no_grad():
        function = compiled.forward.aot_compile(inputs)
    function.save_compiled_function(str(directory / "aot_compiled.bin"))
    return lambda *args, **kwargs: function(model, *args, **kwargs)


def _load_aot(subject: Subject, model: Any, inputs: Inputs, directory: Path) -> Call:
    import torch

    model = _with_plain_results(subject, model)
    with (directory / "aot_compiled.bin").open("rb") as file:
        function = torch.compiler.load_compiled_function(file, f_globals=type(model).forward.__globals__)

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(model, *args, **kwargs)

    call.compiled = function  # type: ignore[attr-defined]
    return call


def _with_plain_results(subject: Subject, model: Any) -> Any:
    """Saved by ``aot_compile``, a model that returns transformers' containers loads in no other process."""
    if subject.kind == "decoder":
        return model
    import torch

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, **named: Any) -> Any:
            return self.inner(**named, return_dict=False)

    return Plain()


def allow_any_threads(way: str, function: Any) -> None:
    """``aot_compile`` checks on every call that the number of threads is the one it was compiled with."""
    if way == AOT:
        function.compiled.disable_guard_check()


def _exported(subject: Subject, model: Any, inputs: Inputs) -> Any:
    import torch

    with torch.no_grad():
        return torch.export.export(
            model, *inputs, dynamic_shapes=subject.dynamic_shapes(torch.export.Dim), strict=False
        )


def _prepare_package(subject: Subject, model: Any, inputs: Inputs, directory: Path) -> Call:
    import torch
    import torch._inductor

    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(
            _exported(subject, model, inputs), package_path=str(directory / "model.pt2")
        )
    return _load_package(subject, model, inputs, directory)


def _load_package(subject: Subject, model: Any, inputs: Inputs, directory: Path) -> Call:
    import torch._inductor

    return torch._inductor.aoti_load_package(str(directory / "model.pt2"))


def _prepare_vllm(subject: Subject, model: Any, inputs: Inputs, directory: Path) -> Call:
    import vllm_way

    vllm_way.save(_exported(subject, model, inputs), subject.splitting_ops, directory / "bundle.pkl")
    return _load_vllm(subject, model, inputs, directory)


def _load_vllm(subject: Subject, model: Any, inputs: Inputs, directory: Path) -> Call:
    import vllm_way

    return vllm_way.load(directory / "bundle.pkl", model)


_PREPARE: dict[str, Callable[[Subject, Any, Inputs, Path], Call]] = {
    EAGER: _eager,
    OURS: stitched,
    WHOLE: partial(stitched, split=False),
    COMPILE: _compile,
    AOT: _prepare_aot,
    PACKAGE: _prepare_package,
    VLLM: _prepare_vllm,
}
_LOAD: dict[str, Callable[[Subject, Any, Inputs, Path], Call]] = {
    EAGER: _eager,
    OURS: stitched,
    WHOLE: partial(stitched, split=False),
    UNCHECKED: partial(stitched, check="none"),
    BACKGROUND: partial(stitched, check="background"),
    RUNNER: _with_runner,
    IMPORTED: stitched,
    COMPILE: _compile,
    MEGA: _load_mega,
    AOT: _load_aot,
    PACKAGE: _load_package,
    VLLM: _load_vllm,
}
