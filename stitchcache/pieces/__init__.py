"""Pieces: graphs that are compiled, each into a file, and loaded from it. A backend does both.

A warm start loads AOTInductor's libraries without this file (``torchside.load_library``).
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule

from stitchcache.errors import BackendError, CompilerMissingError, OptionError
from stitchcache.options import BACKENDS, COMPILER_OPTIONS
from stitchcache.records import dataclass
from stitchcache.torchside import inductor, load_library
from stitchcache.torchside.caller import append_caller, compile_caller
from stitchcache.torchside.ops import OpOverload, is_view, known_range

if TYPE_CHECKING:
    from stitchcache.pieces.deferred import Deferred

log = logging.getLogger("stitchcache")

FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError, ArithmeticError)
"""What code that is not ours may raise on values that it was never meant for."""

Options = Mapping[str, Any]
"""Options of a backend, as ``torch.compile(options=...)`` takes them."""

BoxedPiece = Callable[[list[Any]], Sequence[Any]]
"""A loaded piece: takes one list of tensors, returns a sequence of tensors."""

ENOUGH = 32768
"""Elements that its largest tensor can have from which a piece's loops are shared among threads: ATen's own
grain size. Waking a thread takes longer than the loops of a smaller piece do."""

HEADERS = "aot_inductor.precompile_headers"
HEADERS_PAY_FROM = 6
"""Pieces from which precompiled headers pay: the first piece makes both, which takes one core 10 s once on a
machine, and each piece compiles 2 s sooner."""

_LINE_TABLES = "aot_inductor.enable_line_tables"
# How deep Inductor cuts loops up; how many threads there are is asked when they run.
_NOMINAL_THREADS = 8
# Namespaces whose ops Inductor knows how to call from C++. Any other op would go through a proxy
# that needs a second file beside the library and is slower than a call from the stitching code.
_NATIVE = {"aten", "prims", "prim", "inductor", "_quantized", "quantized_decomposed"}
# Random ops that AOTInductor leaves to eager's own kernels, so that they draw eager's numbers.
_RANDOM = {"rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "bernoulli", "dropout"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What is to be compiled: one call of a piece in the stitching graph."""

    name: str  # of its submodule
    key: str  # equal for equal pieces, in this model or another
    gm: GraphModule  # not changed; placeholders carry fake tensors in ``meta["val"]``; it returns a tuple
    backend: str  # ``eager`` where the wanted backend cannot keep its meaning


class Backend:
    """Compiles pieces to files and loads files as callables: :meth:`compile` and :meth:`load` are its job.

    The other methods may stay as they are. All that compiles runs in forked children where there can be some.
    """

    # As users write it, and as entries record it.
    name: str

    def compile(self, piece: GraphModule, directory: Path, options: Options) -> Path:
        """Compile a piece; a BackendError if it cannot be compiled, or not to one file.

        Args:
            piece: A copy of its graph, which may be changed.
            directory: An empty directory to work in.
            options: From :meth:`prepare`.

        Returns:
            The file to store.
        """
        raise NotImplementedError

    def begin(self, piece: GraphModule, directory: Path, options: Options) -> Callable[[], Path]:
        """:meth:`compile` in two parts: what has to run in one thread, and a function for the rest."""
        path = self.compile(piece, directory, options)
        return lambda: path

    def load(self, path: Path, device: str) -> BoxedPiece:
        """Load a stored file in place, for a device such as ``cuda:1``; a BackendError if it cannot be."""
        raise NotImplementedError

    def foreign_ops(self, piece: GraphModule) -> set[str]:
        """Ops that this backend cannot compile and that must be called between pieces instead."""
        return set()

    def check_options(self, options: Options) -> None:
        """Raise an ``OptionError`` for an option that the compiler does not know."""

    def warmth(self, devices: Collection[str], options: Options) -> Callable[[], object] | None:
        """What fills caches on disk that compiling reads; it is called in a process of its own."""
        return None

    def prepare(self, devices: Collection[str], options: Options, pieces: int) -> Options:
        """Do once what every compile would do again; forked children inherit it.

        Gives options that compile so many pieces soonest, to the same result; what the user's say stays. A
        CompilerMissingError if it needs a C++ compiler and there is none.
        """
        return options

    def around_compiling(self, devices: Collection[str], options: Options) -> AbstractContextManager[None]:
        """A block that compiles, after :meth:`prepare`: what cannot change anything is skipped in it."""
        return nullcontext()


class InductorBackend(Backend):
    """Inductor's standalone artifacts, for graphs that AOTInductor refuses.

    Loading one imports Inductor and, on the CPU, compiles the C++ again where Inductor's own cache is empty:
    seconds, and a compiler, where AOTInductor needs neither.
    """

    name = "inductor"

    def compile(self, piece: GraphModule, directory: Path, options: Options) -> Path:
        """Compile a piece to what ``CompiledArtifact.save`` writes."""
        path = directory / "piece.inductor"
        inductor.compile_artifact(piece, _fakes(piece), {**thread_options(piece, options), **options}, path)
        return path

    def load(self, path: Path, device: str) -> BoxedPiece:
        """Load an artifact."""
        # On the CPU it builds C++ again, where its directory has not got it.
        _require_own_directory()
        artifact = inductor.load_artifact(path)
        # It takes its inputs one by one, not as a list.
        return lambda inputs: artifact(*inputs)

    def check_options(self, options: Options) -> None:
        """Look names up among Inductor's, which is imported only where there are options of the user's."""
        if options.keys() <= COMPILER_OPTIONS.keys():
            return
        # Not at the top: few make mistakes, and every warm start imports this file.
        from difflib import get_close_matches

        known = list(inductor.settings().get_config_copy())
        for name in options:
            if name.replace("-", "_") not in known:
                near = get_close_matches(name, known, 2)
                hint = f"did you mean {' or '.join(near)}?" if near else "see torch._inductor.list_options()."
                place = f"options[{name!r}]"
                raise OptionError(f"{place}: Inductor has no such option; {hint}", option=place)

    def foreign_ops(self, piece: GraphModule) -> set[str]:
        """Ops of a piece that Inductor would get wrong."""
        # A warm start plans nothing.
        from stitchcache.graph.effects import is_random, target_name

        ops = [node for node in piece.graph.nodes if isinstance(node.target, OpOverload)]
        return {target_name(op.target) for op in ops if self._is_foreign(op.target, is_random(op))}

    def _is_foreign(self, op: OpOverload, random: bool) -> bool:
        # Before torch 2.13 Inductor draws for dropout before all other random ops of a piece.
        return random and "dropout" in str(op) and torch.__version__ < "2.13"

    def warmth(self, devices: Collection[str], options: Options) -> Callable[[], object] | None:
        """Leave the caller and the probes of the CPU on disk, which takes half of Inductor's imports only."""
        usable = "cpu" in devices and find_compiler() is not None

        def warm() -> None:
            _require_own_directory()
            self._caller()
            inductor.probe_best(options)

        return warm if usable else None

    def _caller(self) -> Path | None:
        """A library to append to what is compiled, compiled now if it is not there; ``None`` without one."""
        return None

    def prepare(self, devices: Collection[str], options: Options, pieces: int) -> Options:
        """Check for a C++ compiler, import Inductor and probe the CPU."""
        if find_compiler() is None:
            raise CompilerMissingError(
                f"backend={self.name!r} needs a C++ compiler and found no {_compiler()} on PATH. Install "
                "one (Debian, Ubuntu: 'apt install g++'; Fedora: 'dnf install gcc-c++'; conda: "
                "'cxx-compiler'), point CXX at it, or use backend='eager'. Loading what is cached needs no "
                "compiler.",
                backend=self.name,
            )
        _require_own_directory()
        inductor.import_compiler()
        warm = self.warmth(devices, options)
        if warm is not None:
            warm()
        return options

    def around_compiling(self, devices: Collection[str], options: Options) -> AbstractContextManager[None]:
        """Skip probes of the CPU that could not change anything."""
        return inductor.few_probes(options, "cpu" in devices)


class AotiBackend(InductorBackend):
    """AOTInductor: one shared library a piece. Loading one imports neither Inductor nor Dynamo."""

    name = "aoti"

    def prepare(self, devices: Collection[str], options: Options, pieces: int) -> Options:
        """As for Inductor; and do without precompiled headers where they cost more than they save."""
        super().prepare(devices, options, pieces)
        known = hasattr(inductor.settings().aot_inductor, "precompile_headers")
        # On accelerators compilers run beside Inductor, each on a core of its own: there they pay later.
        cores = 0 if set(devices) == {"cpu"} else len(os.sched_getaffinity(0))
        few = known and pieces < max(HEADERS_PAY_FROM, cores)
        return {**({HEADERS: False} if few else {}), **options}

    def _is_foreign(self, op: OpOverload, random: bool) -> bool:
        # Custom ops too, and random ops that would draw other numbers.
        others = random and str(op).split(".")[1] not in _RANDOM
        return others or op.namespace not in _NATIVE or super()._is_foreign(op, random)

    def compile(self, piece: GraphModule, directory: Path, options: Options) -> Path:
        """Compile a piece to a library."""
        return self.begin(piece, directory, options)()

    def begin(self, piece: GraphModule, directory: Path, options: Options) -> Callable[[], Path]:
        """Lower a piece to C++ and kernels; the function that it returns compiles the C++."""
        on_gpu = any(isinstance(fake, torch.Tensor) and fake.is_cuda for fake in _fakes(piece))
        if on_gpu:
            inductor.keep_sums_apart(piece.graph)
            piece.recompile()
        deferred = self._deferred(directory, options, on_gpu)
        # Debug sections are two thirds of a small library, all of which a warm start reads and digests.
        asked = "AOT_INDUCTOR_ENABLE_LINE_TABLES" in os.environ
        known = getattr(inductor.settings().aot_inductor, "enable_line_tables", False)
        chosen = {
            **thread_options(piece, options),
            **({_LINE_TABLES: False} if known and not asked else {}),
            **({"cpp.cxx": (str(deferred.stand_in),)} if deferred is not None else {}),
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
                backend=self.name,
            )
        proxies = _proxies(directory)
        if proxies:
            raise BackendError(
                f"AOTInductor has no C++ entry for {', '.join(proxies)} and wants to call it through a "
                "proxy, which stitchcache does not store. Name it in splitting_ops, or use "
                "backend='inductor' or 'eager'.",
                backend=self.name,
            )
        places = (str(directory), *inductor.directories(), str(Path(torch.__file__).parent), sys.prefix)

        def finish() -> Path:
            if deferred is not None:
                deferred.run()
            _hide_paths(Path(built), places)
            caller = self._caller()
            if caller is not None:
                append_caller(Path(built), caller)
            return Path(built)

        return finish

    def _deferred(self, directory: Path, options: Options, on_gpu: bool) -> Deferred | None:
        """What lets the C++ be compiled later; ``None`` where Inductor is to do it."""
        # Precompiled headers belong to the name of a compiler, and each stand-in has its own.
        usual = tuple(inductor.settings().cpp.cxx) == (None, _compiler()) and "cpp.cxx" not in options
        if not usual or options.get(HEADERS) is not False or "TORCH_INDUCTOR_INSTALL_GXX" in os.environ:
            return None
        # A warm start compiles nothing.
        from stitchcache.pieces.deferred import Deferred

        # On accelerators compilers run beside Inductor, and of most machines' cores half are idle then.
        apart = inductor.interface() if on_gpu and len(os.sched_getaffinity(0)) > 3 else ""
        return Deferred(_compiler(), directory / "deferred", apart)

    def _caller(self) -> Path | None:
        """The caller's library; without it torch's runner will do."""
        from stitchcache.store import distrusted_way  # a warm start builds nothing

        compiler = find_compiler()
        try:
            path = compile_caller(compiler) if compiler else None
            if path is not None and (reason := distrusted_way(str(path.parent), of_torch=True)):
                raise OSError(reason)
            return path
        except (OSError, subprocess.CalledProcessError) as error:
            said = str(getattr(error, "stderr", "") or error)
            log.debug("pieces will hold the GIL: %s", said.strip().partition("\n")[0])
            return None

    def load(self, path: Path, device: str) -> BoxedPiece:
        """Map a library."""
        return load_library(path, device)


def get_backend(name: str) -> Backend:
    """Find a backend by name; an OptionError if there is no such."""
    if name == "aoti":
        return AotiBackend()
    if name == "inductor":
        return InductorBackend()
    if name == "eager":
        # A warm start seldom has such pieces.
        from stitchcache.pieces.eager import EagerBackend

        return EagerBackend()
    raise OptionError(f"backend={name!r}: there is {', '.join(BACKENDS)}.", option="backend")


def _hide_paths(library: Path, directories: Sequence[str]) -> None:
    """Write slashes over directories that stand in a library: they tell of its builder, and of the host.

    They stand in messages of the runtime's checks. An absolute path stays one. The longest go first, as one
    may lie in another.
    """
    data = library.read_bytes()
    private = {*directories, *map(os.path.realpath, directories)} - {"/", "/usr", "/usr/local"}
    for directory in sorted(private, key=len, reverse=True):
        data = data.replace(os.fsencode(directory), b"/" * len(os.fsencode(directory)))
    library.write_bytes(data)


def _require_own_directory() -> None:
    """Raise a ``BackendError`` where others can write where torch builds: what it finds there, it loads."""
    # A warm start builds nothing.
    from stitchcache.store import distrusted_way

    for place in inductor.directories():
        reason = distrusted_way(place, of_torch=True)
        if reason is not None:
            raise BackendError(
                f"torch builds in {place}, and loads what it finds there: {reason}; or set "
                "TORCHINDUCTOR_CACHE_DIR, and TMPDIR for precompiled headers, to directories of your own.",
                backend="inductor",
            )


def _compiler() -> str:
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def find_compiler() -> str | None:
    """Path of the C++ compiler that Inductor takes: ``CXX`` if it is set, else the platform's."""
    return shutil.which(_compiler())


def _fakes(piece: GraphModule) -> Sequence[Any]:
    return [node.meta["val"] for node in piece.graph.nodes if node.op == "placeholder"]


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


def thread_options(piece: GraphModule, options: Options) -> dict[str, Any]:
    """Inductor's options for the threads of a piece: as many as torch has in the process that calls it.

    Inductor writes the number of threads of the compiling process into its C++, and leaves parallel loops out
    where that is one. Our children compile on one thread each, and a prewarmed image runs on other machines.
    So a piece that can be given enough work asks for the number when it runs, and one that is always small
    runs on a single thread. What it can be given is what its sizes' ranges allow. The example does not count:
    it is in no key, so whoever compiled first would decide for all others. The user's own word counts.
    """
    if {"cpp.threads", "cpp.dynamic_threads"} & options.keys() or inductor.settings().cpp.threads > 0:
        return {}
    # Neither weights nor views count: only what a piece computes.
    calls = (node for node in piece.graph.nodes if isinstance(node.target, OpOverload))
    computed = (call.meta.get("val") for call in calls if not is_view(call.target))
    tensors = (t for value in computed for t in (value if isinstance(value, (list, tuple)) else [value]))
    if any(isinstance(t, torch.Tensor) and math.prod(map(_most, t.shape)) >= ENOUGH for t in tensors):
        return {"cpp.threads": _NOMINAL_THREADS, "cpp.dynamic_threads": True}
    return {"cpp.threads": 1}


def _most(size: int | torch.SymInt) -> int:
    if not isinstance(size, torch.SymInt):
        return size
    # A warm start does without sympy.
    from stitchcache.graph.symbols import finite

    top = finite(known_range(size)[1])
    # Without a bound, or where only data decides, it may be large.
    return ENOUGH if top is None else top
