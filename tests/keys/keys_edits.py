"""Edits of the project under ``project/``: each may only miss, or hit with an unchanged graph."""

# Edits of files: (name, file, old text, new text).
FILES = [
    ("helper's default", "ops.py", "OFFSET = 1.0", "OFFSET = 2.0"),
    ("helper's constant", "ops.py", "n * 0.25", "n * 0.75"),
    ("helper's operator", "ops.py", "x * settings.TABLE", "x / settings.TABLE"),
    ("closure's constant", "ops.py", "make_gate(4.0)", "make_gate(1.0)"),
    ("global of another module", "settings.py", "FACTOR = 2.0", "FACTOR = 3.0"),
    ("table of another module", "settings.py", '{"a": 1.0', '{"a": 9.0'),
    ("dataclass default", "settings.py", "scale: float = 0.5", "scale: float = 0.75"),
    ("dataclass default factory", "settings.py", '"shift": 3', '"shift": 4'),
    ("enum default", "settings.py", "mode: Mode = Mode.ADD", "mode: Mode = Mode.MUL"),
    ("enum value", "settings.py", 'ADD = "add"', 'ADD = "plus"'),
    ("branch", "model.py", "if self.enabled:", "if not self.enabled:"),
    ("activation", "model.py", "torch.relu(x)", "torch.tanh(x)"),
    ("class constant", "model.py", "EPS = 1e-3", "EPS = 1e-2"),
    ("layers", "model.py", "range(2)", "range(3)"),
    ("final activation", "model.py", "F.gelu(x)", "F.silu(x)"),
    (
        "buffer's shape",
        "model.py",
        "torch.ones(settings.width))\n        self.act",
        "torch.ones(1))\n        self.act",
    ),
    ("exponent", "model.py", "exponent=2", "exponent=3"),
    (
        "plain tensor",
        "model.py",
        "torch.arange(settings.width, dtype",
        "torch.arange(1, settings.width + 1, dtype",
    ),
    ("set of names", "model.py", '{"q", "k"}', '{"q", "k", "v"}'),
    ("plain object's argument", "model.py", "ops.Pure(1.5)", "ops.Pure(2.5)"),
    ("plain object's method", "ops.py", "x + self.bias * self.rate", "x - self.bias * self.rate"),
    ("plain object's class attribute", "ops.py", "rate = 0.1", "rate = 0.2"),
    ("module imported in a function", "lazy.py", "LAST = 7.0", "LAST = 8.0"),
    ("function imported in a function", "lazy.py", "x - LAST", "x + LAST"),
    (
        "order of statements",
        "model.py",
        "ops.gate(ops.fold(ops.shift(x)))",
        "ops.fold(ops.gate(ops.shift(x)))",
    ),
    (
        "linear's bias",
        "model.py",
        "settings.width)\n        self.norm",
        "settings.width, bias=False)\n        self.norm",
    ),
    ("norm's eps", "model.py", "nn.LayerNorm(settings.width)", "nn.LayerNorm(settings.width, eps=1e-2)"),
    ("input's shape", "model.py", "torch.ones(4, 8)", "torch.ones(5, 8)"),
    ("a comment", "ops.py", "edit: blue", "edit: green"),
]

# Changes at run time, after the model was built: (name, statements).
AFTER = [
    ("attribute of one layer", "model.blocks[1].enabled = False"),
    ("attribute of all layers", "for b in model.blocks: b.EPS = 0.5"),
    ("class attribute", "proj.model.Block.EPS = 0.5"),
    ("new attribute", "model.blocks[0].unused = 3"),
    ("setting shared by layers", "model.settings.scale = 4.0"),
    (
        "setting of one layer",
        "import copy\nb = model.blocks[0]\nb.settings = copy.deepcopy(b.settings)\nb.settings.scale = 9.0",
    ),
    ("nested setting", "model.settings.extras['shift'] = 11"),
    ("enum setting", "model.settings.mode = proj.settings.Mode.MUL"),
    ("function attribute", "model.blocks[0].act = torch.sigmoid"),
    ("lambda attribute", "model.blocks[0].act = lambda x: x * 5"),
    (
        "partial's keyword",
        "import functools\nmodel.blocks[0].power = functools.partial(torch.pow, exponent=4)",
    ),
    ("object's attribute", "model.blocks[0].pure.bias = 8.0"),
    ("object's class attribute", "proj.ops.Pure.rate = 8.0"),
    ("object's method", "proj.ops.Pure.apply = lambda self, x: x * 2"),
    ("instance's method", "model.blocks[0].pure.apply = lambda x: x * 2"),
    ("instance's forward", "model.blocks[0].forward = lambda x: x * 2"),
    ("class's forward", "def forward(self, x):\n    return x * 3\nproj.model.Block.forward = forward"),
    ("torch class's forward", "torch.nn.LayerNorm.forward = lambda self, x: x * 3"),
    ("torch function", "torch.nn.functional.gelu = lambda x: x * 3"),
    ("torch function used within torch", "torch.nn.functional.linear = lambda x, w, b=None: x * 3"),
    ("value of a plain tensor", "model.blocks[0].table[2] = 99.0"),
    ("dtype of a plain tensor", "model.blocks[0].table = model.blocks[0].table.double()"),
    ("set", "model.blocks[0].names.discard('k')"),
    ("training", "model.train()"),
    ("training of a layer", "model.drop.train()"),
    ("dtype", "model.double()\nargs = (args[0].double(),)"),
    ("dtype of the input", "args = (args[0].double(),)"),
    ("shape of the input", "args = (torch.ones(7, 8),)"),
    ("strides of the input", "args = (torch.ones(8, 4).t(),)"),
    ("buffer's dtype", "model.blocks[0].seen = model.blocks[0].seen.double()"),
    (
        "buffer's persistence",
        "b = model.blocks[0]\nt = b.seen\ndel b.seen\nb.register_buffer('seen', t, persistent=False)",
    ),
    ("tied parameters", "model.blocks[1].linear.weight = model.blocks[0].linear.weight"),
    ("tied modules", "model.blocks[1] = model.blocks[0]"),
    ("overlapping buffers", "model.blocks[1].seen = model.blocks[0].seen[:]"),
    ("forward hook", "model.blocks[0].register_forward_hook(lambda m, i, o: o * 2)"),
    ("forward pre-hook", "model.blocks[0].register_forward_pre_hook(lambda m, i: (i[0] * 2,))"),
    ("replaced module", "model.blocks[0].norm = torch.nn.Identity()"),
    (
        "parametrization",
        "class P(torch.nn.Module):\n    def forward(self, w):\n        return w * 2\n"
        "torch.nn.utils.parametrize.register_parametrization(model.blocks[0].linear, 'weight', P())",
    ),
    ("weight norm", "torch.nn.utils.parametrizations.weight_norm(model.blocks[0].linear)"),
    ("global", "proj.settings.FACTOR = 17.0"),
    ("global's item", "proj.settings.TABLE['a'] = 17.0"),
    ("global object's attribute", "proj.settings.SHARED.scale = 17.0"),
    ("global function", "proj.ops.fold = lambda x: x * 17.0"),
    ("global function's default", "proj.ops.shift.__defaults__ = (17.0,)"),
    ("global function's closure", "proj.ops.gate = proj.ops.make_gate(0.5)"),
    ("cell of a closure", "proj.ops.gate.__closure__[0].cell_contents = 0.5"),
    ("cached function", "proj.ops.slope = lambda n: 17.0"),
    (
        "module behind a name",
        "import types\nm = types.ModuleType('proj.settings')\n"
        "vars(m).update(vars(proj.settings))\nm.FACTOR = 5.0\nproj.ops.settings = m",
    ),
    ("module imported in a function", "proj.lazy.LAST = 17.0"),
    ("environment variable", "os.environ['PROJ_DOUBLE'] = '1'"),
    ("builtin", "proj.model.len = lambda x: 17"),
    ("autocast", "torch.autocast('cpu').__enter__()"),
    ("default dtype", "torch.set_default_dtype(torch.float64)"),
    ("matmul precision", "torch.set_float32_matmul_precision('medium')"),
    ("deterministic algorithms", "torch.use_deterministic_algorithms(True)"),
    ("default device", "torch.set_default_device('meta')"),
    (
        "function mode",
        "from torch.overrides import TorchFunctionMode\nclass M(TorchFunctionMode):\n"
        "    def __torch_function__(self, f, t, a=(), k=None):\n        return f(*a, **(k or {}))\n"
        "M().__enter__()",
    ),
]

# Changes that mean nothing: these must hit.
HARMLESS = [
    ("weights", "with torch.no_grad():\n    for p in model.parameters(): p.add_(1.0)"),
    ("value of a buffer", "model.blocks[0].seen.fill_(3.0)"),
    ("values of the input", "args = (torch.randn(4, 8),)"),
    ("gradient of the input", "args = (torch.randn(4, 8, requires_grad=True),)"),
    ("home and host", "os.environ.update(HOME='/nowhere', HOSTNAME='other', USER='somebody')"),
    ("directory", "os.chdir('/')"),
    ("threads", "torch.set_num_threads(2)"),
    ("generator", "torch.manual_seed(123)"),
    ("grad mode", "torch.set_grad_enabled(False)"),
    ("logger", "import logging\nlogging.getLogger('proj').setLevel(10)"),
    ("a loaded module", "import colorsys"),
    ("ran before", "model(args[0])"),
]


def all_edits():
    """Every edit as the script ``keys_forks.py`` takes it."""
    files = [
        {"name": f"file: {name}", "file": file, "old": old, "new": new} for name, file, old, new in FILES
    ]
    after = [{"name": f"then: {name}", "after": text} for name, text in AFTER]
    # A model that ran has warm caches; the look stands for what they hold.
    harmless = [{"name": f"harmless: {name}", "after": text, "looked": True} for name, text in HARMLESS]
    return [*files, *after, *harmless]
