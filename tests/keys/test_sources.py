# ruff: noqa: E501 - small modules read best as one line
"""What a capture read beyond its model: recorded, checked, and refused where it cannot be seen."""

import functools
import hashlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from stitchcache.keys.check import check_sources
from stitchcache.keys.recorder import SourceRecorder
from stitchcache.keys.walk import Walk
from stitchcache.types import SourceRef, TargetRecord

ROOT = Path(__file__).parent.parent.parent

SCRIPT = """
import json, pickle, sys
import torch
from stitchcache.torchside import tree
from stitchcache.explanation import explain_differences
from stitchcache.keys.check import check_sources
from stitchcache.keys.recorder import SourceRecorder
from stitchcache.keys import target_key
from stitchcache.types import TargetRecord
import part

LEVEL = 2.0


def helper(x):
    return x * LEVEL


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.names = ("one", "two", "three")
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, x):
        return part.more(helper(self.linear(x))) + len(self.names) * ("one" in {"one", "two", "three"})


def run(action, path):
    model, args = Net().eval(), (torch.ones(3, 2),)
    leaves, spec = tree.flatten((args, {}))
    key = target_key(model, [("x", leaves[0])], tree.dumps(spec), None, (), None, "aoti", {}, None)
    if action == "record":
        with SourceRecorder() as recorder:
            model(*args)
        record = TargetRecord(graph_hash="0" * 64, sources=recorder.sources, globals=recorder.globals)
        with open(path, "wb") as file:
            pickle.dump((key, record), file)
        print(json.dumps({"unsound": recorder.unsound, "reason": key.reason}))
        return
    with open(path, "rb") as file:
        old, record = pickle.load(file)
    heavy = [m for m in sys.modules if m.startswith(("torch._dynamo", "torch._inductor", "torch.export"))]
    changed = check_sources(record)
    new = [m for m in sys.modules if m.startswith(("torch._dynamo", "torch._inductor", "torch.export"))]
    answer = {"same": old.key == key.key, "changed": changed, "heavy": sorted(set(new) - set(heavy))}
    answer["differ"] = explain_differences(old.factors, key.factors)
    print(json.dumps(answer))


if __name__ == "__main__":
    run(*sys.argv[1:])
"""

PART = """
SHIFT = 1.0


def more(x):
    return x + SHIFT
"""


def project(folder):
    folder.mkdir()
    (folder / "part.py").write_text(PART)
    (folder / "script.py").write_text(SCRIPT)
    return folder


def run(folder, *command, seed="0", **variables):
    path = os.pathsep.join([str(ROOT), str(folder)])
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path, **variables}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = project(tmp_path_factory.mktemp("recorded") / "project")
    out = folder.parent / "record"
    assert run(folder, "script.py", "record", out, seed="1") == {"unsound": None, "reason": None}
    return out


def test_another_process_place_home_host_and_seed_hit(recorded, tmp_path):
    folder = project(tmp_path / "moved")
    home = {"HOME": str(tmp_path), "HOSTNAME": "elsewhere", "USER": "somebody"}
    answer = run(folder, "script.py", "lookup", recorded, seed="77", **home)
    assert answer == {"same": True, "changed": None, "heavy": [], "differ": {}}


def test_a_script_hits_when_it_is_imported(recorded, tmp_path):
    folder = project(tmp_path / "imported")
    code = f"import script; script.run('lookup', {str(recorded)!r})"
    answer = run(folder, "-c", code)
    assert answer["same"], answer["differ"]
    assert answer["changed"] is None


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("part.py", "x + SHIFT", "x - SHIFT", "part.py"),
        ("part.py", "SHIFT = 1.0", "SHIFT = 2.0", "part.py"),
        ("script.py", "LEVEL = 2.0", "LEVEL = 3.0", "script.py"),
    ],
)
def test_an_edited_file_is_named(recorded, tmp_path, file, old, new, says):
    folder = project(tmp_path / "edited")
    path = folder / file
    path.write_text(path.read_text().replace(old, new))
    answer = run(folder, "script.py", "lookup", recorded)
    assert says in answer["changed"]


# ---- what makes a capture unsound


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """Writes a module, imports it, and takes it away after the test."""
    monkeypatch.syspath_prepend(str(tmp_path))
    names = []

    def load(source):
        name = "made_" + tmp_path.name.replace("-", "_")
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        names.append(name)
        return __import__(name)

    yield load
    for name in names:
        sys.modules.pop(name, None)


def recorded_call(function, *args):
    with SourceRecorder() as recorder:
        function(*args)
    return recorder


def as_record(recorder):
    return TargetRecord(graph_hash="0" * 64, sources=recorder.sources, globals=recorder.globals)


UNSEEN = {
    "what a module computes": (
        "def __getattr__(name):\n    return 3",
        "from {me} import made_up",
        "computes it",
    ),
    "the clock": ("import time", "time.time()", "time.time"),
    "a file": ("", "open(__file__).close()", "open"),
    "a random number": ("import random", "random.random()", "random"),
    "a list of files": ("import os", "os.listdir('.')", "listdir"),
    "code from a string": ("", "eval('1 + 1')", "eval"),
    "its own namespace": ("", "globals()", "globals"),
    "a thread": ("import threading", "threading.Thread(target=len, args=('',)).start()", "thread"),
    "a computed import": ("import importlib", "importlib.import_module('json')", "computed"),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_a_capture_may_not_ask_turns_direct_lookup_off(imported, tmp_path, name):
    header, statement, says = UNSEEN[name]
    me = "made_" + tmp_path.name.replace("-", "_")
    module = imported(f"{header}\ndef f():\n    {statement.replace('{me}', me)}\n")
    assert says in recorded_call(module.f).unsound


def test_functions_made_from_strings_are_covered_by_their_bytecode_or_refused(imported):
    module = imported(
        """
        scope = {}
        exec('def inner(): return 1', scope)
        HOLDER = [scope['inner']]

        def f():
            return HOLDER[0]()
        """
    )
    covered = recorded_call(module.f)
    assert covered.unsound is None
    assert check_sources(as_record(covered)) is None
    exec("def inner(): return 2", module.scope)
    module.HOLDER[0] = module.scope["inner"]
    assert "HOLDER" in check_sources(as_record(covered))
    assert "no source file" in recorded_call(eval("lambda: 1")).unsound


def test_a_dataclass_made_in_the_capture_is_fine(imported):
    module = imported(
        """
        from dataclasses import dataclass

        @dataclass
        class Box:
            value: int = 3

        def f():
            return Box().value
        """
    )
    recorder = recorded_call(module.f)
    assert recorder.unsound is None
    assert check_sources(as_record(recorder)) is None
    module.Box.value = 4
    assert "Box" in check_sources(as_record(recorder))


def test_a_cache_that_was_filled_before_is_refused(imported):
    module = imported(
        """
        import functools

        @functools.lru_cache
        def cached(n):
            return n + 1

        def f():
            return cached(1)
        """
    )
    module.f()
    assert "cache_clear" in recorded_call(module.f).unsound
    module.cached.cache_clear()
    assert recorded_call(module.f).unsound is None


def test_a_global_that_cannot_be_digested_is_named(imported):
    module = imported("import threading\nLOCK = threading.Lock()\ndef f():\n    return LOCK.locked()\n")
    assert f"{module.__name__}.LOCK" in recorded_call(module.f).unsound


def test_a_file_edited_after_its_import_is_refused(imported, tmp_path):
    module = imported("def f():\n    return 1\n")
    assert recorded_call(module.f).unsound is None
    Path(module.__file__).write_text("def f():\n    return 2\n")
    assert "changed since it was imported" in recorded_call(module.f).unsound


def test_loggers_may_be_read(imported):
    module = imported("import logging\nlog = logging.getLogger('any')\ndef f():\n    log.debug('hello')\n")
    recorder = recorded_call(module.f)
    assert recorder.unsound is None
    assert check_sources(as_record(recorder)) is None


def test_environment_variables_that_are_read_are_checked(imported, monkeypatch):
    module = imported("import os\ndef f():\n    return os.environ.get('MADE_UP'), os.getenv('OTHER', '')\n")
    recorder = recorded_call(module.f)
    assert recorder.unsound is None
    assert {name for name, _ in recorder.globals} >= {"env:MADE_UP", "env:OTHER"}
    monkeypatch.setenv("MADE_UP", "1")
    assert "MADE_UP" in check_sources(as_record(recorder))


def test_torch_and_the_library_stand_by_their_versions():
    recorder = recorded_call(functools.partial(torch.nn.Linear(2, 2), torch.ones(1, 2)))
    assert recorder.unsound is None
    assert recorder.sources == ()


def test_a_profiler_that_was_there_before_is_there_again():
    seen = []

    def profiler(frame, event, arg):
        seen.append(event)

    sys.setprofile(profiler)
    try:
        with SourceRecorder():
            pass
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(None)


def test_a_profiler_that_comes_in_between_is_noticed():
    with SourceRecorder() as recorder:
        sys.setprofile(lambda *_: None)
    assert "profiler" in recorder.unsound
    assert sys.getprofile() is None


def test_a_missing_module_is_a_reason(imported):
    module = imported("def f():\n    return 1\n")
    record = as_record(recorded_call(module.f))
    assert check_sources(record) is None
    del sys.modules[module.__name__]
    assert check_sources(record) is None or "not there" in check_sources(record)
    Path(module.__file__).unlink()
    assert module.__name__ in check_sources(record)


# ---- where the recorder is blind, direct lookup is off


FOREIGN = {
    "made by exec": "scope = {'BY': 2.0}\nexec('def inner(): return BY', scope)\nf = scope['inner']\n",
    "made by eval": "f = eval('lambda: BY', {'BY': 2.0})\n",
    "another module's code": (
        "import types\ndef g():\n    return BY\nf = types.FunctionType(g.__code__, {'BY': 2.0, '__name__': __name__})\n"
    ),
    "another function with the same code": (
        "import types\nBY = 1.0\ndef g():\n    return BY\nh = types.FunctionType(g.__code__, {'BY': 2.0})\n"
        "def f():\n    return g() + h()\n"
    ),
    "builtins of its own": (
        "import types\ndef g():\n    return len('ab')\n"
        "f = types.FunctionType(g.__code__, {'__builtins__': {'len': lambda x: 3}, '__name__': __name__})\n"
    ),
    "made by runpy": (
        "import pathlib, runpy, tempfile\npath = pathlib.Path(tempfile.mkdtemp()) / 'ran.py'\n"
        "path.write_text('BY = 2.0\\ndef f(): return BY')\nf = runpy.run_path(str(path))['f']\n"
    ),
    "module by its place": (
        "import importlib.util, pathlib, tempfile\npath = pathlib.Path(tempfile.mkdtemp()) / 'placed.py'\n"
        "path.write_text('BY = 2.0\\ndef f(): return BY')\n"
        "spec = importlib.util.spec_from_file_location('placed', path)\n"
        "module = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(module)\nf = module.f\n"
    ),
    "compiled by sympy": (
        "import sympy\nx = sympy.Symbol('x')\ng = sympy.lambdify(x, sympy.sin(x) * 2, 'math')\n"
        "def f():\n    return g(1.0)\n"
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_functions_whose_globals_no_module_has_turn_direct_lookup_off(imported, name):
    if "sympy" in name:
        pytest.importorskip("sympy")
    module = imported(FOREIGN[name])
    said = recorded_call(module.f).unsound
    assert "define it in a module" in said or "no source file" in said, said


CACHES = {
    "of a method": (
        "class Table:\n    BY = 2.0\n    @functools.lru_cache\n    def get(self, n):\n        return self.BY * n\n"
        "TABLE = Table()\nwarm = TABLE.get\ndef f():\n    return TABLE.get(1)\n"
    ),
    "in a closure": (
        "BY = 2.0\ndef make():\n    @functools.lru_cache\n    def get(n):\n        return BY * n\n"
        "    def f():\n        return get(1)\n    return f, get\nf, warm = make()\nHELD = [f]\n"
        "def f():\n    return HELD[0]()\n"
    ),
    "in a list": "@functools.lru_cache\ndef warm(n):\n    return n\nHELD = [warm]\ndef f():\n    return HELD[0](1)\n",
    "called again with something else": (
        "@functools.lru_cache\ndef warm(n):\n    return n\ndef f():\n    return warm(2) + warm(1)\n"
    ),
}


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_that_is_warm_is_found_wherever_it_is(imported, name):
    module = imported("import functools\n" + CACHES[name])
    cold = recorded_call(module.f)
    assert cold.unsound is None
    # What it read before is in no record, so a warm one is refused at a lookup, too.
    assert "cache_clear" in check_sources(as_record(cold))
    clear = getattr(module.warm, "cache_clear", None) or module.Table.get.cache_clear
    clear()
    assert check_sources(as_record(cold)) is None
    module.warm(1)
    assert "cache_clear" in recorded_call(module.f).unsound


def test_modules_that_are_closed_over_are_read_like_globals(imported, monkeypatch):
    module = imported(
        "def make():\n    import math\n    def f():\n        return math.sqrt(4.0)\n    return f\ng = make()\n"
        "def f():\n    return g()\n"
    )
    recorder = recorded_call(module.f)
    assert recorder.unsound is None
    assert check_sources(as_record(recorder)) is None
    monkeypatch.setattr("math.sqrt", lambda value: 9.0)
    assert "math.sqrt" in check_sources(as_record(recorder))


def test_a_module_that_is_missing_is_recorded_as_missing(imported, monkeypatch, tmp_path):
    module = imported(
        "def f():\n    try:\n        import not_there_yet\n    except ImportError:\n        return 2\n    return 3\n"
    )
    record = as_record(recorded_call(module.f))
    assert check_sources(record) is None
    (tmp_path / "not_there_yet.py").write_text("")
    assert "not_there_yet" in check_sources(record)


def test_ranks_that_torch_reads_for_a_model_are_checked(imported, monkeypatch):
    module = imported(
        "import torch\ndef f():\n    return torch.distributed.is_torchelastic_launched(), "
        "torch.distributed.get_node_local_rank(0)\n"
    )
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    recorder = recorded_call(module.f)
    record = as_record(recorder)
    if recorder.unsound is None:
        assert check_sources(record) is None
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert check_sources(record) is not None


STALE = {
    "plain": "def f():\n    return 1\n",
    "decorated": (
        "import functools\ndef deco(g):\n    @functools.wraps(g)\n    def inner(*a):\n        return g(*a)\n    return inner\n"
        "@deco\ndef g():\n    return 1\ndef f():\n    return g()\n"
    ),
    "cached": "import functools\n@functools.lru_cache\ndef f():\n    return 1\n",
    "wrapped in an object": (
        "class Jit:\n    def __init__(self, fn):\n        self.fn = fn\n    def __call__(self):\n        return self.fn()\n"
        "@Jit\ndef f():\n    return 1\n"
    ),
    "in a tuple": "def f():\n    return (1, -0.0)[1]\n",
    "property": "class C:\n    @property\n    def p(self):\n        return 1\ndef f():\n    return C().p\n",
}


@pytest.mark.parametrize("name", STALE)
def test_what_runs_is_compared_with_what_lies_there(imported, name):
    module = imported(STALE[name])
    module_file = Path(module.__file__)
    record = as_record(recorded_call(module.f))
    times = module_file.stat()
    text = module_file.read_text()
    module_file.write_text(text.replace("return 1", "return 2").replace("-0.0", "0.0"))
    # A copy that keeps times would have the time of the old text.
    os.utime(module_file, ns=(times.st_atime_ns, times.st_mtime_ns - 10**13))
    if hasattr(module.f, "cache_clear"):
        module.f.cache_clear()
    assert "changed since it was imported" in recorded_call(module.f).unsound
    new = hashlib.sha256(module_file.read_bytes()).hexdigest()
    stale = [SourceRef(module=s.module, digest=new, size=module_file.stat().st_size) for s in record.sources]
    found = check_sources(TargetRecord(graph_hash="0" * 64, sources=tuple(stale), globals=()))
    assert "changed since it was imported" in found


def test_what_dynamo_adds_to_a_module_is_no_change_of_its_file(imported):
    """A graph break leaves a function in the module's globals whose code stands in no file."""
    module = imported(
        "import torch\n"
        "def f(x):\n    return x + 1\n"
        "def g(x):\n    x = x * 2\n    torch._dynamo.graph_break()\n    return f(x)\n"
    )
    torch._dynamo.reset()
    torch.compile(module.g, backend="eager")(torch.ones(2))
    added = [value.__code__.co_name for value in vars(module).values() if hasattr(value, "__code__")]
    assert any(name.startswith("torch_dynamo_resume_in") for name in added)
    assert recorded_call(module.f, torch.ones(2)).unsound is None
    torch._dynamo.reset()


def test_two_lambdas_on_one_line_of_an_installed_file_differ(monkeypatch, tmp_path):
    place = tmp_path / "site-packages"
    place.mkdir()
    (place / "one_line_of_two.py").write_text("TWO = (lambda x: x * 2, lambda x: x * 3)\n")
    monkeypatch.syspath_prepend(str(place))
    import one_line_of_two

    def digest(function):
        encoder = Walk().writer("value")
        encoder.put(function)
        return bytes(encoder.out)

    assert digest(one_line_of_two.TWO[0]) != digest(one_line_of_two.TWO[1])
    del sys.modules["one_line_of_two"]


def test_records_of_one_target_share_what_is_known_of_files(imported, monkeypatch):
    module = imported("def f():\n    return 1\n")
    record, shared = as_record(recorded_call(module.f)), Walk()
    assert check_sources(record, shared) is None
    monkeypatch.setattr("stitchcache.keys.check.read_file", None)
    assert check_sources(record, shared) is None
