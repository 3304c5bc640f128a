"""An engine's stitching code goes into a cache and comes back in another process; legacy entries too."""

from __future__ import annotations

import enum
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch

import stitchcache
from stitchcache import errors

DATA = Path(__file__).parent.parent / "data"
LEGACY = json.loads((DATA / "legacy" / "cases.json").read_text())
VLLM = json.loads((DATA / "vllm_code" / "cases.json").read_text())
HASH = "ab" * 32
CODE = """
import torch
import operator

def execution_fn(x, *, __vllm_submods__):
    first = __vllm_submods__[0](x)
    second = __vllm_submods__[1](first, __vllm_consts__[0])
    return (second,)
"""
NAMES = ["first", "second"]
CALLABLES = {"first": lambda x: x + 1, "second": lambda x, kind: x.to(kind)}


@pytest.fixture
def cache(tmp_path) -> stitchcache.Cache:
    return stitchcache.Cache(tmp_path / "cache")


def tensors(value):
    """Lists of floats as tensors, whatever holds them."""
    if isinstance(value, list) and value and all(isinstance(item, float) for item in value):
        return torch.tensor(value)
    if isinstance(value, (list, tuple)):
        return [tensors(item) for item in value]
    return {key: tensors(item) for key, item in value.items()} if isinstance(value, dict) else value


# -- round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["list", "dumped", "stock pickle"])
def test_constants_may_be_a_list_or_bytes(cache, form):
    table = [torch.float64]
    if form == "dumped":
        other = stitchcache.save_execution(cache, "cd" * 32, CODE, NAMES, table)
        table = cache.get(other).consts
    elif form == "stock pickle":
        table = pickle.dumps(table)
    assert stitchcache.save_execution(cache, HASH, CODE, NAMES, table) == HASH
    run = stitchcache.load_execution(HASH[:8], CALLABLES, cache=cache)
    assert run(torch.ones(2))[0].equal(torch.full((2,), 2.0, dtype=torch.float64))
    artifact = cache.get(HASH)
    same = stitchcache.compile_execution_fn(artifact.code, CALLABLES, artifact.submod_names, artifact.consts)
    assert same(torch.ones(2))[0].dtype == torch.float64


def test_pieces_come_back_in_another_process(cache, fresh_process):
    stored = {"first": b"1", "second": b"torch.float64"}
    stitchcache.save_execution(
        cache, HASH, CODE, NAMES, [torch.float64], stored, {"engine": "2.1", "rank": 0}
    )
    said = fresh_process(f"""
        import json, sys
        import stitchcache, torch

        def load(name, path):
            text = path.read_bytes().decode()
            return (lambda x: x + int(text)) if name == "first" else lambda x, kind: x.to(eval(text))

        cache = stitchcache.Cache({str(cache.root)!r})
        run = stitchcache.load_execution({HASH!r}, load, cache=cache)
        factors = [f.name for f in cache.get({HASH!r}).factors if f.name.startswith("user.")]
        compilers = [name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules]
        result = run(torch.ones(1))[0]
        print(json.dumps([str(result.dtype), result.item(), factors, compilers]))
    """)
    assert said == ["torch.float64", 2.0, ["user.engine", "user.rank"], []]


def test_equal_pieces_are_stored_once_and_files_are_taken(cache, tmp_path):
    (tmp_path / "piece").write_bytes(b"same")
    stitchcache.save_execution(
        cache, HASH, CODE, NAMES, [torch.float64], {"first": b"same", "second": tmp_path / "piece"}
    )
    assert len(cache.get(HASH).blobs) == 1
    paths = {}
    stitchcache.load_execution(
        HASH, lambda name, path: paths.setdefault(name, path) and CALLABLES[name], cache=cache
    )
    assert paths["first"] == paths["second"]
    assert paths["first"].read_bytes() == b"same"


def test_a_name_without_a_piece_gets_no_path(cache):
    stitchcache.save_execution(cache, HASH, CODE, NAMES, [torch.float64], {"second": b"x"})
    seen = {}

    def load(name, path):
        seen[name] = path is None
        return CALLABLES[name]

    stitchcache.load_execution(HASH, load, cache=cache)
    assert seen == {"first": True, "second": False}


def test_what_was_saved_is_a_whole_entry(cache):
    stitchcache.save_execution(cache, HASH, CODE, NAMES, [torch.float64], {"first": b"bytes"})
    report = cache.verify()
    assert not report.findings if hasattr(report, "findings") else report
    assert [header.graph_hash for header in cache.entries()] == [HASH]
    assert cache.entries()[0].backends == ("engine",)
    # Saving again replaces it.
    stitchcache.save_execution(cache, HASH, CODE, NAMES, [torch.float32])
    run = stitchcache.load_execution(HASH, CALLABLES, cache=cache)
    assert run(torch.ones(1))[0].dtype == torch.float32


@pytest.mark.parametrize("case", LEGACY, ids=lambda case: f"format {case['format']} {case['file'][:8]}")
@pytest.mark.parametrize("way", ["prefix", "path", "artifact"])
def test_legacy_entries_run(case, way, tmp_path):
    shutil.copy(DATA / "legacy" / case["file"], tmp_path)
    cache = stitchcache.Cache(tmp_path)
    source = {
        "prefix": lambda: case["graph_hash"][:10],
        "path": lambda: tmp_path / case["file"],
        "artifact": lambda: cache.get(case["graph_hash"]),
    }[way]()
    submods = {name: eval(text) for name, text in case["submods"].items()}
    run = stitchcache.load_execution(source, submods, cache=cache)
    result = run(*map(tensors, case["args"]))
    if isinstance(case["expect"], str):  # described in words
        assert result[0].tolist() == [2.5, 7.5]
    else:
        flat = result if isinstance(result, tuple) else [result]
        expected = tensors(case["expect"])
        for one, other in zip(
            flat, [expected] if isinstance(expected, torch.Tensor) else expected, strict=True
        ):
            torch.testing.assert_close(one, other, check_dtype=False)


@pytest.mark.parametrize("case", VLLM, ids=lambda case: case["name"])
def test_vllms_code_goes_in_and_comes_back(case, cache):
    consts = bytes.fromhex(case["consts_pickle"]) if case["consts_pickle"] else None
    submods = {name: eval(text) for name, text in case["submods"].items()}
    arguments = [tensors(value) for value in case["args"]]
    plain = pickle.loads(consts) if consts else None
    expected = stitchcache.compile_execution_fn(case["code"], submods, case["submod_names"], plain)
    stitchcache.save_execution(cache, HASH, case["code"], case["submod_names"], consts)
    run = stitchcache.load_execution(HASH, submods, cache=cache)
    copies = [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]
    torch.testing.assert_close(run(*copies), expected(*arguments), equal_nan=True)


# -- refusals -------------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"graph_hash": "short"}, errors.OptionError, "64 lowercase hex digits"),
        ({"graph_hash": HASH.upper()}, errors.OptionError, "64 lowercase hex digits"),
        ({"code": b"import torch"}, errors.OptionError, "code is a bytes"),
        ({"code": "import os"}, errors.EntryFormatError, "import"),
        ({"code": CODE.replace("[1]", "[2]")}, errors.EntryFormatError, "2"),
        (
            {"code": CODE.replace("__vllm_submods__[0](x)", "torch.ops.nowhere.op.default(x)")},
            errors.LinkError,
            "nowhere",
        ),
        ({"submod_names": "first"}, errors.OptionError, "submod_names is a str"),
        ({"submod_names": ["first", 2]}, errors.OptionError, r"submod_names\[1\]"),
        ({"consts": []}, errors.EntryFormatError, "const"),
        ({"consts": b"\x80"}, errors.EntryFormatError, "consts"),
        ({"consts": pickle.dumps([os.getcwd])}, errors.ForbiddenGlobalError, "getcwd"),
        ({"consts": "text"}, errors.OptionError, "consts is a str"),
        ({"consts": [Colour.RED]}, errors.UnserializableConstError, "register_const_type"),
        ({"pieces": {"third": b""}}, errors.OptionError, "takes no such submodule.*GraphModule"),
        ({"pieces": {"first": "text"}}, errors.OptionError, "pieces"),
        ({"pieces": {"first": Path("/nowhere/piece")}}, errors.OptionError, "no file /nowhere/piece"),
        ({"pieces": [b""]}, errors.OptionError, "pieces is a list"),
        ({"factors": {"a": (x for x in "ab")}}, errors.OptionError, "plain value"),
        ({"factors": "text"}, errors.OptionError, "factors is a str"),
        ({"cache": "directory"}, errors.OptionError, "Cache"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_cannot_be_loaded_is_not_saved(cache, change, kind, said):
    given = {
        "cache": cache,
        "graph_hash": HASH,
        "code": CODE,
        "submod_names": NAMES,
        "consts": [torch.float64],
    }
    with pytest.raises(kind, match=said):
        stitchcache.save_execution(**{**given, **change})
    assert not cache.entries()


def test_a_missing_entry_and_a_missing_callable_are_named(cache):
    with pytest.raises(errors.GraphHashError, match="no entry"):
        stitchcache.load_execution(HASH, CALLABLES, cache=cache)
    with pytest.raises(errors.GraphHashError, match="no such file"):
        stitchcache.load_execution(cache.root / "entry.msgpack", CALLABLES, cache=cache)
    stitchcache.save_execution(cache, HASH, CODE, NAMES, [torch.float64])
    with pytest.raises(errors.LinkError, match="second") as caught:
        stitchcache.load_execution(HASH, {"first": abs}, cache=cache)
    assert list(caught.value.missing) == ["second"]
    with pytest.raises(errors.LinkError, match="first, second"):
        stitchcache.load_execution(HASH, lambda name, path: None, cache=cache)
    with pytest.raises(errors.OptionError, match="submod_callables is a list"):
        stitchcache.load_execution(HASH, [abs], cache=cache)


def test_a_damaged_piece_is_not_run(cache):
    stitchcache.save_execution(cache, HASH, CODE, NAMES, [torch.float64], {"first": b"bytes"})
    path = cache.blob_path(cache.get(HASH).blobs[0])
    path.chmod(0o600)
    path.write_bytes(b"bytez")
    with pytest.raises(errors.EntryDamagedError, match="piece 'first'"):
        stitchcache.load_execution(HASH, CALLABLES, cache=stitchcache.Cache(cache.root))


def test_pieces_of_another_machine_are_not_loaded(cache, monkeypatch):
    stitchcache.save_execution(cache, HASH, CODE, NAMES, [torch.float64], {"first": b"bytes"})
    stitchcache.save_execution(cache, "cd" * 32, CODE, NAMES, [torch.float64])
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    with pytest.raises(errors.EnvironmentMismatchError, match=r"env\.torch"):
        stitchcache.load_execution(HASH, CALLABLES, cache=cache)
    # Code and constants alone are not compiled for anything.
    assert (
        stitchcache.load_execution("cd" * 32, CALLABLES, cache=cache)(torch.ones(1))[0].dtype == torch.float64
    )


def test_each_door_names_the_other(cache):
    model = torch.nn.Linear(2, 2).eval()
    compiled = stitchcache.compile(model, (torch.ones(1, 2),), backend="eager", cache=cache)
    with pytest.raises(errors.BindError, match=r"stitchcache\.load\("):
        stitchcache.load_execution(compiled.graph_hash, {}, cache=cache)
    stitchcache.save_execution(cache, HASH, CODE, NAMES, [torch.float64])
    with pytest.raises(errors.BindError, match="load_execution"):
        stitchcache.load(HASH, model, cache=cache)


def test_the_example_compiles_once(tmp_path, fresh_process):
    file = DATA.parents[1] / "docs" / "examples" / "engine.py"
    words = []
    for _ in range(2):
        done = fresh_process(f"""
            import runpy, sys
            sys.argv = ["engine.py", {str(tmp_path / "cache")!r}]
            runpy.run_path({str(file)!r}, run_name="__main__")
        """)
        words.append(done.stdout.split())
    assert [said[0] for said in words] == ["compiled", "loaded"]
    assert all(said[-1] == "True" for said in words)
    assert sys.modules.get("engine") is None
