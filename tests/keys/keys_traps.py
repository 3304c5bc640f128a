# ruff: noqa: E501 - a table reads best with one line for each column
"""Small models that read what is easily overlooked, each with an edit that changes what they compute."""

import json
import shutil
import sys
import tempfile
from pathlib import Path

HEAD = """
import abc, collections, contextlib, dataclasses, decimal, enum, functools, locale, math, os, pathlib, random, sys
import numpy as np
import torch
from torch import nn
from proj import side

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.setup()

    def setup(self):
        pass

    def forward(self, x):
        return self.linear(x) * self.factor()

def build():
    torch.manual_seed(0)
    return {net}().eval(), (torch.ones(2, 4),)
"""

# name: (methods of the model, text of proj/side.py, statements that change what it computes)
TRAPS = {
    "namespace of a module": (
        "def factor(self): return side.__dict__['N']", "N = 2.0", "proj.side.N = 3.0"),
    "vars() of a module": ("def factor(self): return vars(side)['N']", "N = 2.0", "proj.side.N = 3.0"),
    "getattr on a module": ("def factor(self): return getattr(side, 'N')", "N = 2.0", "proj.side.N = 3.0"),
    "loaded modules": (
        "def factor(self): return sys.modules['proj.side'].N", "N = 2.0", "proj.side.N = 3.0"),
    "globals of a function": (
        "def factor(self): return side.f.__globals__['N']", "N = 2.0\ndef f(): pass", "proj.side.N = 3.0"),
    "command line": (
        "def factor(self): return len(sys.argv) * 2.0", "", "import sys; sys.argv = ['a', 'b', 'c', 'd']"),
    "import path": ("def factor(self): return len(sys.path)", "", "import sys; sys.path = [*sys.path, 'x']"),
    "computed attribute of a module": (
        "def factor(self): return side.N", "K = 2.0\ndef __getattr__(name): return K", "proj.side.K = 3.0"),
    "file through pathlib": (
        "def factor(self): return float(pathlib.Path(side.P).read_text())",
        "P = '/tmp/keys-trap'\nopen(P, 'w').write('2')", "open(proj.side.P, 'w').write('3')"),
    "file that is there": (
        "def factor(self): return 2.0 if os.path.exists(side.P) else 3.0",
        "import os\nP = '/tmp/keys-trap-2'\nif os.path.exists(P): os.remove(P)", "open(proj.side.P, 'w')"),
    "file of numpy": (
        "def factor(self): return float(np.load(side.P)[0])",
        "import numpy\nP = '/tmp/keys-trap.npy'\nnumpy.save(P, [2.0])",
        "import numpy\nnumpy.save(proj.side.P, [3.0])"),
    "file of torch": (
        "def factor(self): return torch.load(side.P)['a']",
        "import torch\nP = '/tmp/keys-trap.pt'\ntorch.save({'a': 2.0}, P)",
        "import torch\ntorch.save({'a': 3.0}, proj.side.P)"),
    "random number of a library function": (
        "def factor(self): return random.uniform(0, 1)", "", "import random; random.seed(5)"),
    "random number of numpy": (
        "def factor(self): return float(np.random.rand())", "", "import numpy; numpy.random.seed(5)"),
    "number of threads": (
        "def factor(self): return torch.get_num_threads() + 1.0", "", "torch.set_num_threads(3)"),
    "seed of torch": (
        "def factor(self): return float(torch.initial_seed() % 7)",
        "import torch\ntorch.manual_seed(1)", "build = proj.model.build\ntorch.manual_seed(5)"),
    "rank": (
        "def factor(self): return float(torch.distributed.get_rank() if torch.distributed.is_initialized() else 7)",
        "",
        "import torch.distributed as dist\ndist.init_process_group('gloo', rank=0, world_size=1, "
        "store=dist.HashStore())"),
    "registered subclass": (
        "def factor(self): return 2.0 if isinstance(self.plain, side.Kind) else 3.0\n"
        "    def setup(self): self.plain = side.Plain()",
        "import abc\nclass Kind(abc.ABC): pass\nclass Plain: pass", "proj.side.Kind.register(proj.side.Plain)"),
    "subclasses": (
        "def factor(self): return len(side.Kind.__subclasses__()) + 1.0",
        "class Kind: pass", "class More(proj.side.Kind): pass"),
    "metadata of a dataclass": (
        "def factor(self): return dataclasses.fields(self.options)[0].metadata['by']\n"
        "    def setup(self): self.options = side.Options()",
        "import dataclasses\n@dataclasses.dataclass\nclass Options:\n"
        "    a: int = dataclasses.field(default=1, metadata={'by': 2.0})",
        "import types\nproj.side.Options.__dataclass_fields__['a'].metadata = types.MappingProxyType({'by': 3.0})"),
    "annotations": (
        "def factor(self): return 2.0 if type(self.options).__annotations__['a'] is int else 3.0\n"
        "    def setup(self): self.options = side.Options()",
        "class Options:\n    a: int = 1", "proj.side.Options.__annotations__['a'] = float"),
    "names of variables": (
        "def factor(self): return float(len([n for n in os.environ if n.startswith('TRAP_')]) + 1)",
        "", "os.environ['TRAP_A'] = '1'"),
    "variable as bytes": (
        "def factor(self): return float(os.environb.get(b'TRAP_B', b'2'))", "", "os.environ['TRAP_B'] = '3'"),
    "variable in a mapping": (
        "def factor(self): return 2.0 if 'TRAP_C' in os.environ else 3.0", "", "os.environ['TRAP_C'] = '1'"),
    "precision of decimals": (
        "def factor(self): return float(decimal.getcontext().prec)", "", "import decimal; decimal.getcontext().prec = 7"),
    "locale": (
        "def factor(self): return 2.0 if locale.localeconv()['thousands_sep'] == '' else 3.0",
        "import locale", "import locale\nlocale.localeconv = lambda: {'thousands_sep': ','}"),
    "recursion limit": (
        "def factor(self): return float(sys.getrecursionlimit())", "", "import sys; sys.setrecursionlimit(5000)"),
    "working directory": (
        "def factor(self): return float(len(os.path.abspath('x')))", "", "os.chdir('/')"),
    "property of the class": (
        "@property\n    def p(self): return side.N\n    def factor(self): return self.p", "N = 2.0", "proj.side.N = 3.0"),
    "descriptor": (
        "d = side.D(2.0)\n    def factor(self): return self.d",
        "class D:\n    def __init__(self, n): self.n = n\n    def __get__(self, o, t=None): return self.n",
        "proj.model.Net2.__dict__['d'].n = 3.0"),
    "__getattr__ of the model": (
        "def __getattr__(self, name):\n        if name == 'magic': return side.N\n"
        "        return super().__getattr__(name)\n    def factor(self): return self.magic",
        "N = 2.0", "proj.side.N = 3.0"),
    "closure in a hook": (
        "def setup(self): self.linear.register_forward_hook(side.hook(2.0))\n    def factor(self): return 1.0",
        "def hook(n):\n    def h(m, i, o): return o * n\n    return h",
        "h = next(iter(model.linear._forward_hooks.values()))\nh.__closure__[0].cell_contents = 3.0"),
    "pre-hook with keywords": (
        "def setup(self): self.linear.register_forward_pre_hook(side.hook, with_kwargs=True)\n"
        "    def factor(self): return 1.0",
        "N = 2.0\ndef hook(m, a, k): return (a[0] * N,), k", "proj.side.N = 3.0"),
    "object called by a hook": (
        "def setup(self): self.linear.register_forward_hook(side.Hook())\n    def factor(self): return 1.0",
        "class Hook:\n    n = 2.0\n    def __call__(self, m, i, o): return o * self.n", "proj.side.Hook.n = 3.0"),
    "decorator's state": (
        "@side.times(2.0)\n    def factor(self): return 1.0",
        "import functools\ndef times(n):\n    def wrap(f):\n        @functools.wraps(f)\n"
        "        def g(*a): return f(*a) * g.n\n        g.n = n\n        return g\n    return wrap",
        "proj.model.Net2.factor.n = 3.0"),
    "attribute of a partial": (
        "def setup(self):\n        import functools\n        self.p = functools.partial(side.f)\n        self.p.n = 2.0\n"
        "    def factor(self): return self.p.n", "def f(): pass", "model.p.n = 3.0"),
    "slots of a configuration": (
        "def setup(self): self.config = side.Config()\n    def factor(self): return self.config.n",
        "class Config:\n    __slots__ = ('n',)\n    def __init__(self): self.n = 2.0", "model.config.n = 3.0"),
    "number of ctypes": (
        "def setup(self):\n        import ctypes\n        self.n = ctypes.c_double(2.0)\n    def factor(self): return self.n.value",
        "", "model.n.value = 3.0"),
    "number of numpy": (
        "def setup(self): self.n = np.float32(2.0)\n    def factor(self): return float(self.n)",
        "", "import numpy\nmodel.n = numpy.float32(3.0)"),
    "state of a thread": (
        "def factor(self): return side.LOCAL.n", "import threading\nLOCAL = threading.local()\nLOCAL.n = 2.0",
        "proj.side.LOCAL.n = 3.0"),
    "context variable": (
        "def factor(self): return side.V.get()", "import contextvars\nV = contextvars.ContextVar('V', default=2.0)",
        "proj.side.V.set(3.0)"),
    "metaclass": (
        "def factor(self): return side.Kind.n",
        "class Meta(type):\n    n = 2.0\nclass Kind(metaclass=Meta): pass", "proj.side.Meta.n = 3.0"),
    "enumeration's attribute": (
        "def factor(self): return side.Mode.A.n",
        "import enum\nclass Mode(enum.Enum):\n    A = 1\n    @property\n    def n(self): return TABLE[self]\n"
        "TABLE = {Mode.A: 2.0}", "proj.side.TABLE[proj.side.Mode.A] = 3.0"),
    "enumeration member's attribute": (
        "def factor(self): return side.Mode.A.n",
        "import enum\nclass Mode(enum.Enum):\n    A = 1\nMode.A.n = 2.0", "proj.side.Mode.A.n = 3.0"),
    "attribute of an exception class": (
        "def factor(self): return side.Trouble.n", "class Trouble(ValueError):\n    n = 2.0", "proj.side.Trouble.n = 3.0"),
    "instance of an exception": (
        "def factor(self): return side.E.args[0]", "E = ValueError(2.0)", "proj.side.E = ValueError(3.0)"),
    "dispatch by type": (
        "def factor(self): return side.f(1)",
        "import functools\n@functools.singledispatch\ndef f(x): return 2.0",
        "proj.side.f.register(int, lambda x: 3.0)"),
    "iterator": ("def factor(self): return next(side.I)",
        "import itertools\nI = itertools.count(2)", "next(proj.side.I)"),
    "pruned weight": (
        "def setup(self):\n        from torch.nn.utils import prune\n        prune.l1_unstructured(self.linear, 'weight', 3)\n"
        "    def factor(self): return 1.0", "",
        "from torch.nn.utils import prune\nprune.remove(model.linear, 'weight')"),
    "old weight norm": (
        "def setup(self): self.linear = torch.nn.utils.weight_norm(self.linear, dim=0)\n    def factor(self): return 1.0",
        "", "next(iter(model.linear._forward_pre_hooks.values())).dim = 1"),
    "chain through a class": (
        "def factor(self): return side.Outer.Inner.n", "class Outer:\n    class Inner:\n        n = 2.0",
        "proj.side.Outer.Inner.n = 3.0"),
    "module in a list": (
        "def factor(self): return side.L[0].n", "import torch\nclass M(torch.nn.Module):\n    n = 2.0\nL = [M()]",
        "proj.side.L[0].n = 3.0"),
    "keyword default of a helper": (
        "def factor(self): return side.f()", "def f(*, n=2.0): return n", "proj.side.f.__kwdefaults__['n'] = 3.0"),
    "code of a helper": (
        "def factor(self): return side.f()", "def f(): return 2.0", "proj.side.f.__code__ = (lambda: 3.0).__code__"),
    "function of the library": (
        "def factor(self): return math.floor(2.5) * 1.0", "", "import math\nmath.floor = lambda x: 3"),
    "constant of the library": ("def factor(self): return math.pi", "", "import math\nmath.pi = 3.0"),
    "warning filters": ("def factor(self): return float(len(side.warnings.filters))", "import warnings",
        "import warnings\nwarnings.simplefilter('ignore')"),
    "dtype of a default": ("def factor(self): return torch.tensor(1.5).double() if torch.get_default_dtype() is torch.float32 else 2.0",
        "", "torch.set_default_dtype(torch.float64)\nargs = (args[0],)"),
    "reload": (
        "def factor(self): return side.f()", "def f(): return 2.0",
        "import importlib, pathlib\np = pathlib.Path(proj.side.__file__)\np.write_text('def f(): return 3.0')\n"
        "importlib.reload(proj.side)"),
}  # fmt: skip


def source_of(name):
    methods, side, _ = TRAPS[name]
    head = HEAD.replace("{net}", "Net2")
    return f"{head}\nclass Net2(Net):\n    {methods}\n", side


def run(name):
    """Record the model, then look it up after its edit."""
    from keys_forks import in_child

    model, side = source_of(name)
    folder = Path(tempfile.mkdtemp(prefix="trap-"))
    (folder / "proj").mkdir()
    for file, text in {"__init__": "", "model": model, "side": side}.items():
        (folder / "proj" / f"{file}.py").write_text(text)
    modules = {"modules": "proj.model, proj.side"}
    base, stored = in_child(folder, {"name": name, **modules}, None)
    same = edited = None
    if stored is not None and base["unsound"] is None and base["reason"] is None:
        same, _ = in_child(folder, {"name": name, **modules}, stored)
    if stored is not None:
        edited, _ = in_child(folder, {"name": name, **modules, "after": TRAPS[name][2]}, stored)
    shutil.rmtree(folder)
    return {"name": name, "base": base, "same": same, "edited": edited}


def main():
    import torch
    import torch.export

    torch.set_num_threads(1)
    torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),), strict=False)

    json.dump([run(name) for name in sys.argv[1:] or TRAPS], sys.stdout)


if __name__ == "__main__":
    main()
