"""One warm Inductor environment: probes and headers are made once, whoever needs them."""

from __future__ import annotations

import os
import shutil
import sys

import pytest

from stitchcache.pieces import get_backend
from stitchcache.pieces.compiling import HEADERS, HEADERS_PAY_FROM

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


@pytest.mark.parametrize(
    ("devices", "pieces", "options", "headers"),
    [
        (["cpu"], HEADERS_PAY_FROM - 1, {}, False),
        (["cpu"], HEADERS_PAY_FROM, {}, None),
        (["cpu"], 1, {HEADERS: True}, True),
        (["cpu"], HEADERS_PAY_FROM, {HEADERS: False}, False),
        # What an accelerator's pieces gain was not measured.
        (["cpu", "cuda"], 1, {}, None),
    ],
)
def test_few_pieces_make_no_headers_and_who_says_what_is_obeyed(devices, pieces, options, headers):
    given = {**options, "max_autotune": True}
    chosen = get_backend("aoti").options_for(devices, given, pieces)
    assert chosen == {**given, **({} if headers is None else {HEADERS: headers})}
    for name in ("inductor", "eager"):
        assert get_backend(name).options_for(devices, given, pieces) == given
