"""How many pieces at a time; compilers that are missing, fail, or make libraries that crash or lie."""

import json
import os
import shutil
import stat
import textwrap

import pytest
import torch
from torch import nn

import stitchcache
from stitchcache.errors import CompilerMissingError
from stitchcache.pieces import build


@pytest.mark.parametrize(
    ("pieces", "cores", "jobs", "expected"),
    [
        (0, 2, None, 1),
        (1, 2, None, 1),
        (2, 2, None, 2),
        (3, 2, None, 3),
        (4, 2, None, 2),
        (5, 2, None, 3),
        (9, 8, None, 9),
        (15, 8, None, 12),
        (3, 1, None, 1),
        (3, 2, 2, 2),
        (100, 2, 1, 1),
    ],
)
def test_how_many_at_once(pieces, cores, jobs, expected, monkeypatch):
    monkeypatch.setattr(build.os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(build.children, "available", lambda: True)
    assert build.at_once(pieces, jobs) == expected


SCRIPT = """
import json, os, sys, torch
from torch import nn
import stitchcache
from stitchcache.errors import StitchCacheError

class Model(nn.Module):
    def forward(self, x):
        return x * 2 + 1

before = set(os.listdir("/tmp"))
try:
    compiled = stitchcache.compile(Model().eval(), (torch.ones(3),), backend={backend!r},
                                   options={options!r}, cache=stitchcache.Cache({root!r}))
    print(json.dumps(dict(error="", result=compiled(torch.ones(3)).tolist(), hit=compiled.cache_hit)))
except StitchCacheError as error:
    facts = {{k: v for k, v in vars(error).items() if isinstance(v, (str, int, float))}}
    print(json.dumps(dict(error=type(error).__name__, text=str(error), **facts)))
"""


@pytest.fixture(scope="session")
def inductor(tmp_path_factory):
    """Inductor's own directory, shared so that its probes of the machine are made once."""
    return str(tmp_path_factory.mktemp("inductor"))


@pytest.fixture
def attempt(fresh_process, tmp_path, inductor):
    def run(backend="aoti", env=None, options=None):
        env = {"TORCHINDUCTOR_CACHE_DIR": inductor, **(env or {})}
        script = SCRIPT.format(backend=backend, root=str(tmp_path / "cache"), options=options or {})
        return fresh_process(script, env=env)

    return run


def compiler(path, script):
    """A stand-in for g++ that calls the real one as it likes."""
    real = shutil.which("g++")
    path.write_text("#!/bin/sh\nREAL=" + str(real) + "\n" + textwrap.dedent(script))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return {"CXX": str(path)}


@pytest.mark.parametrize("backend", ["aoti", "inductor"])
def test_no_compiler(backend, attempt, tmp_path):
    got = attempt(backend, {"CXX": str(tmp_path / "no-such-compiler")})
    assert got["error"] == "CompilerMissingError"
    assert "no-such-compiler" in got["text"]
    assert "apt install g++" in got["text"]
    assert "backend='eager'" in got["text"]


def test_no_compiler_on_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    model, args = nn.ReLU().eval(), (torch.ones(2),)
    with pytest.raises(CompilerMissingError, match="found no g\\+\\+ on PATH"):
        stitchcache.compile(model, args, cache=stitchcache.Cache(tmp_path / "c"))
    eager = stitchcache.compile(model, args, backend="eager", cache=stitchcache.Cache(tmp_path / "c"))
    assert torch.equal(eager(*args), torch.ones(2))


@pytest.mark.compile
def test_a_compiler_that_fails(attempt, tmp_path):
    env = compiler(
        tmp_path / "g++",
        """
        case "$*" in *-fsyntax-only*|*--version*|*-dumpversion*) exec "$REAL" "$@";; esac
        case "$*" in *piece*) echo "piece.cpp:7:1: fatal error: gizmo.h: No such file" >&2; exit 1;; esac
        exec "$REAL" "$@"
        """,
    )
    got = attempt(env=env)
    assert got["error"] == "BackendError"
    assert "gizmo.h" in got["text"]
    assert got["piece"] == "submod_0"
    assert got["backend"] == "aoti"
    assert len(got["text"]) < 6000


ABORT = """
    case "$*" in
    *piece*-shared*|*-shared*piece*)
        "$REAL" "$@" || exit 1
        while [ $# -gt 0 ]; do [ "$1" = -o ] && out="$2"; shift; done
        case "$out" in *.so)
            echo 'extern "C" void abort(void) __attribute__((noreturn));
                  __attribute__((constructor)) static void now() { abort(); }' > "$out.c++"
            exec "$REAL" -shared -fPIC -x c++ "$out.c++" -o "$out";;
        esac
        exit 0;;
    esac
    exec "$REAL" "$@"
"""


@pytest.mark.compile
def test_a_library_that_aborts_when_it_is_loaded(attempt, tmp_path):
    got = attempt(env=compiler(tmp_path / "g++", ABORT))
    assert got["error"] == "PieceCrashError"
    assert "SIGABRT" in got["text"]
    assert got["exit_code"] == -6
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix in {".so", ".stitch"}]
    # Nothing of it was kept: with a sound compiler the same call works.
    assert attempt()["result"] == [3.0, 3.0, 3.0]


LIE = """
    for argument; do case "$argument" in *.cpp)
        if [ -f "$argument" ]; then
            sed -i 's/static_cast<float>(2.0)/static_cast<float>(5.0)/g' "$argument"
        fi;;
    esac; done
    exec "$REAL" "$@"
"""


@pytest.mark.compile
def test_a_piece_that_computes_something_else(attempt, tmp_path):
    got = attempt(env=compiler(tmp_path / "g++", LIE))
    assert got["error"] == "PieceMismatchError"
    assert got["difference"] == 3.0
    assert "differs by 3" in got["text"]


@pytest.mark.compile
def test_inductor_loads_where_nothing_was_ever_compiled(attempt, tmp_path):
    first = attempt("inductor")
    assert first["error"] == ""
    second = attempt("inductor", {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "empty")})
    assert second["result"] == [3.0, 3.0, 3.0]
    assert second["hit"] is not None


@pytest.mark.compile
def test_aoti_loads_without_a_compiler(attempt, tmp_path):
    assert attempt(options={"max_autotune": False})["error"] == ""
    (tmp_path / "bin").mkdir()
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "empty"), "PATH": str(tmp_path / "bin")}
    got = attempt(env=env, options={"max_autotune": False})
    if got["error"]:
        # The compiler is a factor of the target key: without one, nothing can be shown to be the same.
        assert got["error"] == "CompilerMissingError"
    assert json.dumps(sorted(os.listdir(tmp_path / "bin"))) == "[]"


@pytest.mark.compile
def test_an_option_that_does_not_exist(attempt):
    got = attempt(options={"no_such_option": 1})
    assert got["error"] in {"BackendError", "OptionError"}
    assert "no_such_option" in got["text"]
