"""One warm Inductor environment: probes and headers are made once, whoever needs them."""

from __future__ import annotations

import os
import shutil
import sys

import pytest

from stitchcache.torchside import headers

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


def test_few_pieces_make_no_headers(tmp_path, monkeypatch):
    from torch._inductor import codecache

    monkeypatch.setattr(codecache, "_HEADER_DIR", str(tmp_path))
    few = headers.PAYS_FROM - 1
    assert not headers.worth({}, 0, 0)
    assert not headers.worth({}, 0, few)
    assert headers.worth({}, 0, few + 1)
    assert headers.worth({}, few, 1), "with those before, they pay"
    assert headers.worth({}, headers.PAYS_FROM // 2, 0), "as many again are to be expected"
    # Those of torch.compile are of no use to pieces.
    (tmp_path / "a.h").write_text("#include <torch/csrc/inductor/cpp_prefix.h>")
    (tmp_path / "a.h.gch").touch()
    assert not headers.worth({}, 0, few)
    (tmp_path / "b.h").write_text("#include <torch/csrc/inductor/aoti_include/cpu.h>")
    assert not headers.worth({}, 0, few), "not made yet"
    (tmp_path / "b.h.gch").touch()
    assert headers.worth({}, 0, 1), "once made, they cost nothing"
    assert not headers.worth({headers.OPTION: False}, 0, 1)


def test_who_says_what_of_headers_is_obeyed(tmp_path, monkeypatch):
    from torch._inductor import codecache

    from stitchcache.pieces import get_backend

    monkeypatch.setattr(codecache, "_HEADER_DIR", str(tmp_path))
    aoti, asked = get_backend("aoti"), {headers.OPTION: True, "max_autotune": True}
    assert aoti.tuned(["cpu"], asked, 0, 1) == asked
    assert aoti.tuned(["cpu"], {"max_autotune": True}, 0, 1) == {"max_autotune": True, headers.OPTION: False}
    assert aoti.tuned(["cpu"], {}, 0, headers.PAYS_FROM) == {}
    assert aoti.tuned(["cpu", "cuda"], {}, 0, 1) == {}, "what an accelerator's pieces gain was not measured"
    for name in ("inductor", "eager"):
        assert get_backend(name).tuned(["cpu"], {}, 0, 1) == {}
