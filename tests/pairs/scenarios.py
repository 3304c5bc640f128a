# ruff: noqa: E501 - a table reads best with long lines
"""Starts in two processes with something changed between them: what a deployment does to a model's surroundings.

Each scenario is a small project. The first process compiles its model, then something changes, then a second
process, under another hash seed, looks the model up. ``wrong`` scenarios change what the model computes, so the
second process must not be served the first one's artifact. ``same`` scenarios change nothing that matters, so it
must be a direct hit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MODEL = """
import torch
from torch import nn
{imports}

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
{init}

    def forward(self, x):
        return self.linear(x) * {factor}

def build():
    torch.manual_seed(0)
    return Net().eval(), (torch.ones(2, 4),)
"""


@dataclass(frozen=True)
class Scenario:
    """One project and what happens between the two processes.

    Args:
        files: Path below the project to text, for the first process.
        then: Files that are written before the second process; ``None`` removes one.
        env: Variables of the second process only.
        before: Statements that the second process runs before it imports the model.
        after: Statements that the second process runs between the import and the lookup.
        first: Statements that the first process runs before it imports the model.
        keep_times: Whether changed files get their old times back.
        flags: Of the second interpreter, such as ``-O``.
        move: Whether the project has moved when the second process starts.
        same: Whether nothing that matters has changed.
    """

    files: dict[str, str]
    then: dict[str, str | None] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    before: str = ""
    after: str = ""
    first: str = ""
    keep_times: bool = False
    flags: str = ""
    move: bool = False
    same: bool = False


def project(factor: str, imports: str = "", init: str = "", **files: str) -> dict[str, str]:
    """A project with a model; ``a__b`` names the file ``a/b.py``."""
    lines = "\n".join(f"        {line}" for line in init.splitlines())
    named = {name.replace("__", "/") + ".py": text for name, text in files.items()}
    return {"net.py": MODEL.format(factor=factor, imports=imports, init=lines), **named}


def edited(factor: str = "side.BY", **more: object) -> Scenario:
    """A module's number changes."""
    files = project(factor, "import side", side="BY = 2.0\n")
    return Scenario(files, {"side.py": "BY = 3.0\n"}, **more)  # type: ignore[arg-type]


FUNCTION = "def by(x):\n    return x * {}\n"
SCENARIOS: dict[str, Scenario] = {
    "number of a module": edited(),
    "number of a module, times kept": edited(keep_times=True),
    "own number": Scenario(
        project("BY", "BY = 2.0"), {"net.py": project("BY", "BY = 3.0")["net.py"]}, keep_times=True
    ),
    "function of a module": Scenario(
        project("side.by(1.0)", "import side", side=FUNCTION.format(2.0)), {"side.py": FUNCTION.format(3.0)}
    ),
    "star import": Scenario(
        project("BY", "from side import *", side="BY = 2.0\n"), {"side.py": "BY = 3.0\n"}, keep_times=True
    ),
    "relative import": Scenario(
        {
            "net.py": "from pkg.net import build\n",
            "pkg/__init__.py": "",
            "pkg/net.py": project("BY", "from .side import BY")["net.py"],
            "pkg/side.py": "BY = 2.0\n",
        },
        {"pkg/side.py": "BY = 3.0\n"},
    ),
    "package's own file": Scenario(
        {**project("pkg.BY", "import pkg"), "pkg/__init__.py": "BY = 2.0\n"}, {"pkg/__init__.py": "BY = 3.0\n"}
    ),
    "namespace package": Scenario(
        project("pkg.side.BY", "import pkg.side", pkg__side="BY = 2.0\n"), {"pkg/side.py": "BY = 3.0\n"}
    ),
    "module hidden by another": Scenario(
        project("side.BY", "import side", side="BY = 2.0\n", more__side="BY = 3.0\n"),
        before="import sys; sys.path.insert(0, 'more')",
    ),
    "module becomes a package": Scenario(
        project("side.BY", "import side", side="BY = 2.0\n"), {"side/__init__.py": "BY = 3.0\n"}
    ),
    "optional module appears": Scenario(
        project("BY", "try:\n    from extra import BY\nexcept ImportError:\n    BY = 2.0"),
        {"extra.py": "BY = 3.0\n"},
    ),
    "optional module appears, imported in the forward": Scenario(
        project("by()", "def by():\n    try:\n        import extra\n    except ImportError:\n        return 2.0\n"
                "    return extra.BY"),
        {"extra.py": "BY = 3.0\n"},
    ),
    "table read at import": Scenario(
        {**project("BY", "import json\nBY = json.load(open('table.json'))"), "table.json": "2.0"},
        {"table.json": "3.0"},
    ),
    "table read in the forward": Scenario(
        {**project("json.load(open('table.json'))", "import json"), "table.json": "2.0"}, {"table.json": "3.0"}
    ),
    "table read through pathlib": Scenario(
        {**project("float(pathlib.Path('table').read_text())", "import pathlib"), "table": "2"}, {"table": "3"}
    ),
    "directory listed": Scenario(
        project("float(len(os.listdir('.')))", "import os"), {"more.txt": ""}
    ),
    "variable read at import": Scenario(
        project("BY", "import os\nBY = float(os.environ.get('BY', '2'))"), env={"BY": "3"}
    ),
    "variable read in the forward": Scenario(
        project("float(os.environ.get('BY', '2'))", "import os"), env={"BY": "3"}
    ),
    "variable read as a whole": Scenario(
        project("(3.0 if {**os.environ}.get('BY') else 2.0)", "import os"), env={"BY": "3"}
    ),
    "home directory": Scenario(
        project("float(len(os.path.expanduser('~')))", "import os"), env={"HOME": "/a/longer/home/than/before"}
    ),
    "user's name": Scenario(
        project("float(len(getpass.getuser()))", "import getpass"), env={"LOGNAME": "somebody-else"}
    ),
    "time zone": Scenario(
        project("float(time.timezone + 50000)", "import time"), env={"TZ": "Asia/Tokyo"},
        before="import time; time.tzset()",
    ),
    "working directory": Scenario(
        project("float(len(os.getcwd()))", "import os"), before="import os; os.makedirs('deeper', exist_ok=True)",
        after="import os; os.chdir('deeper')",
    ),
    "command line": Scenario(project("float(len(sys.argv))", "import sys"), before="import sys; sys.argv = ['a'] * 9"),
    "patched by the program": Scenario(
        project("side.BY", "import side", side="BY = 2.0\n"), after="import side; side.BY = 3.0"
    ),
    "patched method": Scenario(
        {"net.py": project("self.by()")["net.py"].replace("    def forward", "    def by(self): return 2.0\n    def forward")},
        after="import net; net.Net.by = lambda self: 3.0",
    ),
    "patched library": Scenario(
        project("math.sqrt(4.0)", "import math"), after="import math; math.sqrt = lambda v: 3.0"
    ),
    "patched torch": Scenario(
        project("1.0"), after="import torch; torch.nn.Linear.forward = lambda self, x: x @ self.weight"
    ),
    "patched functional": Scenario(
        project("1.0"),
        after="import torch\nplain = torch.nn.functional.linear\n"
        "torch.nn.functional.linear = lambda x, w, b=None: plain(x, w)",
    ),
    "numpy's setting": Scenario(
        project("float(len(str(np.float64(1) / 3)) if np.get_printoptions()['precision'] == 8 else 3)", "import numpy as np"),
        after="import numpy; numpy.set_printoptions(precision=3)",
    ),
    "file edited after its import": Scenario(
        project("side.by(1.0)", "import side", side=FUNCTION.format(2.0)),
        {"side.py": FUNCTION.format(3.0)},
        after="open('side.py', 'w').write(OLD['side.py'])",
    ),
    "decorated file edited after its import": Scenario(
        project("side.by(1.0)", "import side", side="import functools\n@functools.lru_cache\n" + FUNCTION.format(2.0)),
        {"side.py": "import functools\n@functools.lru_cache\n" + FUNCTION.format(3.0)},
        after="open('side.py', 'w').write(OLD['side.py'])",
    ),
    "reloaded": Scenario(
        project("side.by(1.0)", "import side", side=FUNCTION.format(2.0)),
        after="import importlib, side\nopen('side.py', 'w').write('def by(x):\\n    return x * 3.0\\n')\n"
        "importlib.invalidate_caches(); importlib.reload(side)\nopen('side.py', 'w').write(OLD['side.py'])",
    ),
    "text executed": Scenario(
        {**project("SPACE['by'](1.0)", "SPACE = {}\nexec(open('rules.txt').read(), SPACE)"), "rules.txt": FUNCTION.format(2.0)},
        {"rules.txt": FUNCTION.format(3.0)},
    ),
    "module by its location": Scenario(
        {
            **project(
                "side.by(1.0)",
                "import importlib.util as u\nspec = u.spec_from_file_location('side_by_place', 'place/side.txt',\n"
                "    loader=__import__('importlib.machinery', fromlist=['x']).SourceFileLoader('side_by_place', 'place/side.txt'))\n"
                "side = u.module_from_spec(spec)\nspec.loader.exec_module(side)",
            ),
            "place/side.txt": FUNCTION.format(2.0),
        },
        {"place/side.txt": FUNCTION.format(3.0)},
    ),
    "script run by runpy": Scenario(
        {**project("SPACE['by'](1.0)", "import runpy\nSPACE = runpy.run_path('rules.py')"), "rules.py": FUNCTION.format(2.0)},
        {"rules.py": FUNCTION.format(3.0)},
    ),
    "module in an archive": Scenario(
        {**project("side.by(1.0)", "import sys, zipfile\nwith zipfile.ZipFile('lib.zip', 'w') as z:\n"
                   "    z.write('inner.txt', 'side.py')\nsys.path.insert(0, 'lib.zip')\nimport side"),
         "inner.txt": FUNCTION.format(2.0)},
        {"inner.txt": FUNCTION.format(3.0)},
    ),
    "weights in a list": Scenario(
        project("self.kept[0]", "import os", "self.scale = nn.Parameter(torch.ones(4) * float(os.environ.get('BY', '2')))\nself.kept = [self.scale]"),
        env={"BY": "3"},
    ),
    "weights in a closure": Scenario(
        project("self.by()", "import os", "w = torch.ones(4) * float(os.environ.get('BY', '2'))\nself.by = lambda: w"),
        env={"BY": "3"},
    ),
    "text's hash": Scenario(project("float(hash('a') % 1000 + 2)")),
    "order of a set of texts": Scenario(
        project("float(len(next(iter(self.names))))", "", "self.names = {'a' * i for i in range(1, 9)}")
    ),
    "list made from a set": Scenario(
        project("float(len(self.names[0]))", "", "self.names = list({'a' * i for i in range(1, 9)})")
    ),
    "dict made from a set": Scenario(
        project("float(len(next(iter(self.names))))", "", "self.names = dict.fromkeys({'a' * i for i in range(1, 9)})")
    ),
    "order of a global set": Scenario(
        project("float(len(next(iter(NAMES))))", "NAMES = frozenset('a' * i for i in range(1, 9))")
    ),
    "address": Scenario(project("float(id(self) % 9973 + 2)")),
    "optimized": Scenario(project("(2.0 if __debug__ else 3.0)"), flags="-O"),
    "optimized, by an assert": Scenario(
        project("by()", "def by():\n    try:\n        assert False\n    except AssertionError:\n        return 2.0\n    return 3.0"),
        flags="-O",
    ),
    "without docstrings": Scenario(
        project("float(len(by.__doc__ or '') + 1)", "def by():\n    '''Text.'''"), flags="-OO"
    ),
    "utf-8 mode": Scenario(project("float(sys.flags.utf8_mode + 2)", "import sys"), flags="-X utf8"),
    "development mode": Scenario(project("float(sys.flags.dev_mode + 2)", "import sys"), flags="-X dev"),
    "module imported from its package in the forward": Scenario(
        {**project("by()", "def by():\n    from pkg import side\n    return side.BY"),
         "pkg/__init__.py": "", "pkg/side.py": "BY = 2.0\n"},
        {"pkg/side.py": "BY = 3.0\n"},
    ),
    "module below others imported in the forward": Scenario(
        {**project("by()", "def by():\n    import pkg.sub.side as side\n    return side.BY"),
         "pkg/__init__.py": "", "pkg/sub/__init__.py": "", "pkg/sub/side.py": "BY = 2.0\n"},
        {"pkg/sub/side.py": "BY = 3.0\n"},
    ),
    "module reached through its package in the forward": Scenario(
        {**project("by()", "import pkg.sub.side\ndef by():\n    import pkg\n    return pkg.sub.side.BY"),
         "pkg/__init__.py": "", "pkg/sub/__init__.py": "", "pkg/sub/side.py": "BY = 2.0\n"},
        {"pkg/sub/side.py": "BY = 3.0\n"},
    ),
    "set made in the forward": Scenario(
        project("float(len(next(iter({name for name in NAMES}))))", "NAMES = ['a' * i for i in range(1, 9)]")
    ),
    "set of a list in the forward": Scenario(
        project("float(len(next(iter(set(NAMES)))))", "NAMES = ['a' * i for i in range(1, 9)]")
    ),
    "keys of two dicts in the forward": Scenario(
        project("float(len(next(iter(NAMES.keys() & NAMES.keys()))))", "NAMES = {'a' * i: i for i in range(1, 9)}")
    ),
    "text's hash by its method": Scenario(project("float('a'.__hash__() % 1000 + 2)")),
    "table read by the package's loader": Scenario(
        {**project("float(pkgutil.get_data('pkg', 'table.txt'))", "import pkgutil, pkg"),
         "pkg/__init__.py": "", "pkg/table.txt": "2"},
        {"pkg/table.txt": "3"},
    ),
    "module of the library hidden by another": Scenario(
        project("colorsys.rgb_to_yiq(2.0, 2.0, 2.0)[0]", "import colorsys"),
        {"colorsys.py": "def rgb_to_yiq(*rgb):\n    return (3.0,)\n"},
        before="import sys; sys.modules.pop('colorsys', None)",
    ),
    "warnings that are errors": Scenario(
        project("by()", "import warnings\ndef by():\n    try:\n        warnings.warn('x')\n"
                "    except UserWarning:\n        return 3.0\n    return 2.0"),
        before="import warnings; warnings.simplefilter('error', UserWarning)",
    ),
    # Nothing that matters differs from here on.
    "other hash seed": Scenario(project("2.0"), same=True),
    "moved": Scenario(project("side.by(1.0)", "import side", side=FUNCTION.format(2.0)), move=True, same=True),
    "touched": Scenario(project("side.BY", "import side", side="BY = 2.0\n"), {"side.py": "BY = 2.0\n"}, same=True),
    "comment in a file that did not run": Scenario(
        project("2.0", side="BY = 2.0\n"), {"side.py": "BY = 2.0  # two\n"}, same=True
    ),
    "more files": Scenario(project("2.0"), {"more.py": "BY = 3.0\n"}, same=True),
    "other variables": Scenario(project("2.0"), env={"HOME": "/nowhere", "USER": "other", "HOSTNAME": "h"}, same=True),
    "other arguments": Scenario(project("2.0"), before="import sys; sys.argv = ['other', '--flag']", same=True),
    "other weights": Scenario(project("2.0"), after="import net, torch\nbuild = net.build\ndef other():\n"
                              "    model, args = build()\n    torch.nn.init.ones_(model.linear.weight)\n    return model, args\n"
                              "net.build = other", same=True),
    "other seed": Scenario(project("2.0"), after="import torch; torch.manual_seed(7)", same=True),
    "more imports": Scenario(project("2.0"), before="import json, decimal, sqlite3, unittest", same=True),
    "set of numbers": Scenario(project("float(len(self.names))", "", "self.names = {1, 2, 3}"), same=True),
    "names in order": Scenario(project("float(len(self.names[0]))", "", "self.names = sorted({'a', 'bb', 'ccc'})"), same=True),
    "sets whose order nobody sees": Scenario(
        project("float(len(set(self.names)) + len(sorted(set(self.names))) + ('a' in {'a', 'b'}))", "",
                "self.names = ['a', 'bb']"), same=True),
    "module imported in the forward": Scenario(
        {**project("by()", "def by():\n    import math\n    from pkg import side\n    return side.BY * math.sqrt(4.0)"),
         "pkg/__init__.py": "", "pkg/side.py": "BY = 2.0\n"}, same=True),
    "no assertions used": Scenario(project("2.0"), before="import warnings; warnings.warn('x')", same=True),
}  # fmt: skip
