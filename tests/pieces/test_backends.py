"""Pieces compiled with Inductor: options, threads, random numbers, and probes of the machine made once."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stitchcache
from stitchcache.capture import capture
from stitchcache.errors import BackendError
from stitchcache.options import COMPILER_OPTIONS
from stitchcache.pieces import ENOUGH, HEADERS, HEADERS_PAY_FROM, get_backend, thread_options
from stitchcache.pipeline.find import Request
from stitchcache.torchside import inductor

cpu_vec_isa = pytest.importorskip("torch._inductor.cpu_vec_isa")

COMPILE = """
import json
import torch
import stitchcache

model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4), torch.nn.ReLU())
made = stitchcache.compile(
    model.eval(),
    (torch.ones(2, 8),),
    splitting_ops=["aten::tanh"],
    options={"stitchcache.jobs": 2, "aot_inductor.precompile_headers": True},
)
with torch.no_grad():
    right = torch.allclose(made(torch.ones(2, 8)), model(torch.ones(2, 8)), atol=1e-5)
print(json.dumps({"hit": made.cache_hit, "right": right, "pieces": len(made.artifact.pieces)}))
"""

COMPILER = """#!{python}
import os, sys
with open({log!r}, "a") as log:
    log.write(" ".join(sys.argv[1:]) + chr(10))
os.execv({real!r}, [{real!r}, *sys.argv[1:]])
"""


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="needs g++")
def test_two_pieces_share_headers_and_probes(tmp_path, fresh_process):
    log = tmp_path / "commands"
    (tmp_path / "bin").mkdir()
    compiler = tmp_path / "bin" / "g++"
    compiler.write_text(COMPILER.format(python=sys.executable, log=str(log), real=shutil.which("g++")))
    compiler.chmod(0o755)
    (tmp_path / "tmp").mkdir()
    done = fresh_process(
        COMPILE,
        env={
            "PATH": f"{compiler.parent}{os.pathsep}{os.environ['PATH']}",
            "TMPDIR": str(tmp_path / "tmp"),
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
            "STITCHCACHE_DIR": str(tmp_path / "cache"),
        },
    )
    assert done == {"hit": None, "right": True, "pieces": 2}
    commands = log.read_text().splitlines()
    headers = [line for line in commands if "c++-header" in line]
    assert len(headers) == 2, "one for the wrappers, one for the kernels"
    sources = [line for line in commands if line.split()[0].endswith((".wrapper.cpp", ".kernel.cpp"))]
    assert len(sources) == 4
    assert all("-include" in line for line in sources)
    probes = [line.split()[0] for line in commands if line.startswith(str(tmp_path / "inductor"))]
    assert 0 < len(probes) == len(set(probes)) <= 4, "only those that decide, and each once"
    assert not list((tmp_path / "tmp").glob("stitchcache-*"))


@pytest.mark.parametrize("which", [0, 1], ids=["what it built", "precompiled headers"])
def test_a_directory_of_torch_that_others_can_write_is_not_used(which, tmp_path, monkeypatch):
    """Headers are not where TORCHINDUCTOR_CACHE_DIR says; who makes that directory first could fill it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "built"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    os.chmod(inductor.directories()[which], 0o777)
    with pytest.raises(BackendError, match=r"mode 0777.*TMPDIR"):
        get_backend("inductor").load(tmp_path / "piece", "cpu")


@pytest.mark.compile
def test_a_caller_that_others_could_have_put_there_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert get_backend("aoti")._caller() is not None
    os.chmod(tmp_path / "stitchcache", 0o777)
    assert get_backend("aoti")._caller() is None


@pytest.mark.parametrize(
    ("devices", "pieces", "options", "headers"),
    [
        (["cpu"], HEADERS_PAY_FROM - 1, {}, False),
        (["cpu"], HEADERS_PAY_FROM, {}, None),
        (["cpu"], 1, {HEADERS: True}, True),
        (["cpu"], HEADERS_PAY_FROM, {HEADERS: False}, False),
        # There each piece has a core for its compiler, beside Inductor.
        (["cpu", "cuda"], 1, {}, False),
        (["cuda"], 10_000, {}, None),
    ],
)
def test_few_pieces_make_no_headers_and_who_says_what_is_obeyed(
    devices, pieces, options, headers, monkeypatch
):
    monkeypatch.setattr("stitchcache.torchside.inductor.probe_best", lambda _: None)
    given = {**options, "max_autotune": True}
    chosen = get_backend("aoti").prepare(devices, given, pieces)
    assert chosen == {**given, **({} if headers is None else {HEADERS: headers})}
    for name in ("inductor", "eager"):
        assert get_backend(name).prepare(devices, given, pieces) == given


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(512, 512)

    def forward(self, x):
        return self.linear(x).relu()


def piece(rows):
    return capture(Wide().eval(), (torch.randn(rows, 512),), {}).gm


@pytest.mark.parametrize(("rows", "shared"), [(2, False), (ENOUGH // 512 - 1, False), (ENOUGH // 512, True)])
def test_enough_work_is_shared(rows, shared):
    found = thread_options(piece(rows), {})
    assert found.get("cpp.dynamic_threads", False) is shared
    assert (found["cpp.threads"] == 1) is not shared


@pytest.mark.parametrize(
    ("most", "shared"), [(ENOUGH // 512 - 1, False), (ENOUGH // 512, True), (None, True)]
)
@pytest.mark.parametrize("example", [4, 16])
def test_a_size_that_varies_counts_as_the_largest_allowed(most, shared, example):
    rows = torch.export.Dim("rows", min=2, max=most)
    gm = capture(Wide().eval(), (torch.randn(example, 512),), {}, ({0: rows},)).gm
    assert thread_options(gm, {}).get("cpp.dynamic_threads", False) is shared


@pytest.mark.parametrize(("elements", "shared"), [(4, False), (ENOUGH, True)])
def test_a_size_that_only_data_decides_counts_as_the_largest_there_can_be(elements, shared):
    class Chosen(nn.Module):
        def forward(self, x):
            return x.nonzero() + 1

    gm = capture(Chosen(), (torch.randn(elements),), {}).gm
    assert thread_options(gm, {}).get("cpp.dynamic_threads", False) is shared


@pytest.mark.parametrize("option", [{"cpp.threads": 4}, {"cpp.dynamic_threads": False}])
def test_what_the_user_says_is_left_alone(option):
    assert thread_options(piece(256), option) == {}


class Reducing(nn.Module):
    """Loops over rows, over elements, and sums over everything: each kind is shared in its own way."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(48)

    def forward(self, x):
        y = nn.functional.gelu(self.norm(x))
        return y, y.sum(0), (y * y).sum(), y.transpose(0, 1).contiguous().amax(1)


@pytest.fixture(scope="session")
def shared_piece(compiled_root):
    """Compiled with a small example in a child that has one thread."""
    torch.manual_seed(0)
    model = Reducing().eval()
    compiled = stitchcache.compile(
        model,
        (torch.randn(3, 48),),
        dynamic_shapes=({0: stitchcache.Dim("rows", min=2, max=8192)},),
        cache=stitchcache.Cache(compiled_root),
    )
    assert len(compiled.artifact.pieces) == 1
    return model, compiled


@pytest.fixture
def any_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# 12 is more than the number that Inductor is told.
@pytest.mark.parametrize("threads", [1, 2, 4, 12])
@pytest.mark.parametrize("rows", [2, 4099])
@pytest.mark.usefixtures("any_threads")
def test_numbers_are_eagers_on_any_number_of_threads(shared_piece, threads, rows):
    model, compiled = shared_piece
    x = torch.randn(rows, 48)
    with torch.no_grad():
        expected = model(x)
    torch.set_num_threads(threads)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)


class Noisy(nn.Module):
    """One of each that a compiled piece may hold, in an order that decides the numbers."""

    def forward(self, x):
        noise = torch.rand_like(x) + torch.randn(3, 4) * torch.randint(0, 9, (3, 4))
        return F.dropout(x + noise, 0.5, True), torch.bernoulli(x), torch.rand(2)


class Rare(nn.Module):
    """Random ops that AOTInductor has no entry for, or draws otherwise."""

    def forward(self, x):
        return torch.normal(x, 1.0) * 2, torch.empty_like(x).exponential_() + 1, torch.multinomial(x, 2)


def agree(model, compiled, x):
    for seed in (0, 7):
        torch.manual_seed(seed)
        want = [*model(x), torch.rand(1)]
        torch.manual_seed(seed)
        got = [*compiled(x), torch.rand(1)]
        for a, b in zip(want, got, strict=True):
            torch.testing.assert_close(b, a)


@pytest.mark.parametrize("model", [Noisy().eval(), Rare().eval()], ids=["noisy", "rare"])
@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("aoti", marks=pytest.mark.compile),
        pytest.param("inductor", marks=pytest.mark.compile),
        "eager",
    ],
)
def test_numbers_are_eagers_under_the_same_seed(compiled_root, backend, model):
    x = torch.rand(3, 4)
    compiled = stitchcache.compile(model, (x,), backend=backend, cache=stitchcache.Cache(compiled_root))
    agree(model, compiled, x)


def test_the_option_is_in_keys_and_the_user_may_say_otherwise():
    assert Request(backend="aoti").backend_options == COMPILER_OPTIONS
    assert Request(backend="eager").backend_options == {}
    chosen = Request(backend="inductor", options={"fallback_random": False, "stitchcache.jobs": 1})
    assert chosen.backend_options == {"fallback_random": False}


BEST = "avx512 avx512_vnni amx_tile"


def forget():
    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    cpu_vec_isa.VecISA._VecISA__bool__impl.cache_clear()
    for isa in cpu_vec_isa.supported_vec_isa_list:
        getattr(type(isa).__bool__, "cache_clear", lambda: None)()


@pytest.fixture
def probes(monkeypatch):
    """A CPU with all of x86's sets, on which every probe works; returns the probes that were made."""
    made = []

    def check_build(self, code):
        made.append(str(self))
        return True

    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.setattr(cpu_vec_isa, "x86_isa_checker", lambda: ["avx2", *BEST.split()])
    monkeypatch.setattr(cpu_vec_isa.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", check_build)
    for name in ("_is_vnni_supported", "_init_amx"):
        monkeypatch.setattr(f"torch.cpu.{name}", lambda: True)
    forget()
    yield made
    forget()


@pytest.mark.parametrize("backend", ["aoti", "inductor"])
def test_a_gpus_pieces_are_compiled_without_probes(probes, backend):
    with get_backend(backend).around_compiling(["cuda"], {}):
        assert not cpu_vec_isa.pick_vec_isa()
        assert not probes
    # What follows in the same process gets what the CPU has.
    assert str(cpu_vec_isa.pick_vec_isa()) == BEST
    assert len(cpu_vec_isa.valid_vec_isa_list()) == 4


@pytest.mark.parametrize("devices", [["cpu"], ["cuda", "cpu"]])
def test_a_cpus_pieces_get_the_best_and_the_rest_are_not_probed(probes, devices):
    with get_backend("aoti").around_compiling(devices, {}):
        assert str(cpu_vec_isa.pick_vec_isa()) == BEST
        assert set(probes) == {BEST}
    assert len(cpu_vec_isa.valid_vec_isa_list()) == 4


def test_what_is_known_stays_known(probes):
    known = cpu_vec_isa.valid_vec_isa_list()
    made = len(probes)
    with get_backend("aoti").around_compiling(["cuda"], {}):
        assert cpu_vec_isa.valid_vec_isa_list() is known
    assert cpu_vec_isa.valid_vec_isa_list() is known
    assert len(probes) == made


@pytest.mark.parametrize("options", [{"cpp.simdlen": 256}, {"cpp.vec_isa_ok": True}])
def test_who_chooses_a_set_is_obeyed(probes, options):
    with get_backend("aoti").around_compiling(["cuda"], options):
        assert len(cpu_vec_isa.valid_vec_isa_list()) == 4


def test_an_error_leaves_nothing_behind(probes):
    with pytest.raises(KeyError), get_backend("aoti").around_compiling(["cuda"], {}):
        raise KeyError
    assert len(cpu_vec_isa.valid_vec_isa_list()) == 4
