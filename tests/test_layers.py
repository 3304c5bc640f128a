"""Rules of the package that no linter knows. Layers and circles are import-linter's, in pyproject.toml."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import stitchcache

ROOT = Path(stitchcache.__file__).parent
TORCH_FREE = {
    "errors",
    "records",
    "types",
    "encoding",
    "containers",
    "store",
    "cache",
    "remote",
    "artifact",
    "nearest",
    "explanation",
}
# Strings and attributes that look like private names of torch, and where they are something else.
PRIVATE_STRINGS = {
    # Lists of what stored code may name: data of the entry format, compared and never looked up in torch.
    "codegen/reach.py",
    "artifact/unpickle.py",
}
PUBLIC_TABLES = {"_parameters", "_buffers", "_modules"}  # why: stitchcache/torchside/__init__.py
PYTHON_OWN = {"_exit", "_getframe", "_fields", "_data", "_repeated_blocks"}  # the last one is diffusers'
# No underscore, and no promise either.
UNPROMISED = {
    "shape_env", "fake_mode", "var_to_range", "deferred_runtime_asserts", "bound_sympy", "suppress_guards",
    "maybe_as_int",
}  # fmt: skip
PRIVATE_MODULE = re.compile(r"torch(\.\w+)*\.(_[a-z]\w*|_C)(\.\w+)*\b|torch\.fx\.experimental\b")
# Where everything that users' code may raise is caught: one failure there must not stop the rest.
BOUNDARIES = {
    "api/prewarm.py",
    "artifact/unpickle.py",
    "capture/export.py",
    "compare.py",
    "pipeline/eager_first.py",
}
EVERYTHING = {"all", "Exception", "BaseException"}


def sources() -> Iterator[tuple[str, str, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        yield name, name.split("/")[0].removesuffix(".py"), ast.parse(path.read_text())


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def at_import_time(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Imports that run when the module is imported: not those in functions or for type checkers."""
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from imported(node)
        todo += list(ast.iter_child_nodes(node))


def test_torch_free_parts_import_no_torch():
    wrong = [
        f"{name}:{line} imports {module}"
        for name, part, tree in sources()
        if part in TORCH_FREE and name not in {"artifact/consts.py"}
        for module, line in imported(tree)
        if module.split(".")[0] == "torch"
    ]
    assert not wrong, "\n".join(wrong)


def own_private_names() -> set[str]:
    """Names with an underscore that our own classes and modules define."""
    found = set()
    for _, _, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in {"self", "cls"}:
                found.add(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
    return found


def private_names_in(tree: ast.AST, own: set[str]) -> Iterator[tuple[int, str]]:
    """Private names of torch that code imports, reads as attributes, or spells in strings."""
    for module, line in imported(tree):
        hidden = module.startswith("torch.") and any(part.startswith("_") for part in module.split("."))
        if hidden or PRIVATE_MODULE.match(module):
            yield line, f"imports {module}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            whole = ast.unparse(node)
            if whole.startswith("torch.ops."):
                continue
            of_size = whole.endswith((".node.expr", ".node.hint"))
            if of_size or is_private(node.attr, own) or PRIVATE_MODULE.match(whole):
                yield node.lineno, f"uses {whole}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if PRIVATE_MODULE.fullmatch(node.value):
                yield node.lineno, f"spells {node.value}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"getattr", "hasattr"}:
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(str(name.value), own):
                yield node.lineno, f"spells {name.value}"


def is_private(name: str, own: set[str]) -> bool:
    hidden = name.startswith("_") and not name.startswith("__")
    return name in UNPROMISED or (hidden and name not in own | PUBLIC_TABLES | PYTHON_OWN)


def test_private_names_of_torch_stand_in_torchside_only():
    """Imported, read as attributes, or spelled in strings."""
    own = own_private_names()
    wrong = [
        f"{name}:{line} {what}"
        for name, part, tree in sources()
        if part not in {"torchside", "records"} and name not in PRIVATE_STRINGS
        for line, what in private_names_in(tree, own)
    ]
    assert not wrong, "\n".join(wrong)


def test_private_names_that_torchside_knows_are_spelled_nowhere_else():
    known = {
        node.value
        for _, part, tree in sources()
        if part == "torchside"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if node.value.startswith("_") and not node.value.startswith("__")
    } - PUBLIC_TABLES
    assert "_forward_hooks" in known
    wrong = [
        f"{name}:{node.lineno} spells {node.value}"
        for name, part, tree in sources()
        if part != "torchside" and name not in PRIVATE_STRINGS
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in known
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "source",
    [
        "from torch._ops import OpOverload",
        "import torch._inductor.config",
        "from torch.fx.experimental.proxy_tensor import make_fx",
        "from torch.overrides import _get_current_function_mode_stack",
        "torch._C._set_grad_enabled(True)",
        "node.target._schema.returns",
        "size.node.shape_env",
        "getattr(tensor, 'fake_mode', None)",
        "sys.modules.get('torch._inductor.config')",
    ],
)
def test_private_names_are_found(source):
    assert list(private_names_in(ast.parse(source), set()))


@pytest.mark.parametrize(
    "source",
    [
        "module._parameters",
        "torch.nn.functional.relu(x)",
        "os._exit(1)",
        "x.__dict__",
        "torch.ops.aten._to_copy",
    ],
)
def test_public_names_are_left_alone(source):
    assert not list(private_names_in(ast.parse(source), set()))


def test_each_file_of_torchside_says_which_torch_it_has_seen():
    import torch

    running = ".".join(torch.__version__.split(".")[:2])
    for name, part, tree in sources():
        if part == "torchside":
            seen = [ast.literal_eval(n.value) for n in tree.body if ast.unparse(n).startswith("SEEN =")]
            assert len(seen) == 1, name
            assert running in seen[0], f"{name} has not seen torch {running}: run tests/matrix.py"
            importlib.import_module(
                f"stitchcache.{name.removesuffix('.py').replace('/', '.').removesuffix('.__init__')}"
            )


@pytest.mark.parametrize(
    "module",
    [
        "stitchcache",
        "stitchcache.errors",
        "stitchcache.types",
        "stitchcache.store",
        "stitchcache.cache",
        "stitchcache.explanation",
    ],
)
def test_importing_brings_no_torch(module):
    source = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", source], check=False, cwd=ROOT.parent).returncode == 0


def test_the_package_keeps_its_own_rules():
    wrong = []
    for name, _, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Assert):
                wrong.append(f"{name}:{node.lineno} assert")
            caught = ast.unparse(node.type) if isinstance(node, ast.ExceptHandler) and node.type else "all"
            if (
                isinstance(node, ast.ExceptHandler)
                and caught in ({"all", "BaseException"} if name in BOUNDARIES else EVERYTHING)
                # Cleaning up and raising again catches nothing.
                and ast.unparse(node.body[-1]) != "raise"
            ):
                wrong.append(f"{name}:{node.lineno} catches everything")
            if isinstance(node, ast.Global):
                wrong.append(f"{name}:{node.lineno} global state")
    assert not wrong, "\n".join(wrong)
