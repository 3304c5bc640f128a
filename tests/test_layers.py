"""Imports point down: design.md section 5, held by reading the sources."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import stitchcache

ROOT = Path(stitchcache.__file__).parent
# What each part may import; siblings do not import each other.
BASE = {"errors", "records", "types", "tree", "pause"}
GROUND = BASE | {"graph", "codegen", "keys"}
STORED = GROUND | {"artifact", "store", "cache", "nearest", "explanation"}
ENGINE = STORED | {"pieces"}
ALLOWED = {
    "errors": set(),
    "records": set(),
    "types": {"records"},
    "pause": set(),
    "tree": {"errors", "types"},
    "graph": BASE,
    "codegen": BASE,
    "keys": BASE,
    "artifact": GROUND,
    "store": GROUND | {"artifact"},
    "cache": GROUND | {"artifact", "store"},
    "nearest": GROUND | {"artifact", "store"},
    "explanation": GROUND | {"artifact", "nearest"},
    "pieces": STORED,
    "capture": ENGINE,
    "runtime": ENGINE,
    "plan": ENGINE,
    "api": ENGINE | {"capture", "runtime", "plan"},
}
TORCH_FREE = {"errors", "records", "types", "store", "cache", "artifact", "nearest", "explanation"}
# Files that may use what torch does not promise; each says so at its top.
PRIVATE = ("pieces/", "tree.py", "graph/symbols.py", "keys/torch_private.py")
PRIVATE_MODULES = ("torch._inductor", "torch._dynamo", "torch._functorch", "torch._C", "torch.utils._")


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


def test_imports_point_down():
    wrong = []
    for name, part, tree in sources():
        if part not in ALLOWED:
            continue
        for module, line in imported(tree):
            parts = module.split(".")
            if parts[0] == "stitchcache" and len(parts) > 1 and parts[1] not in ALLOWED[part] | {part}:
                wrong.append(f"{name}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_every_part_has_a_layer():
    top = {"__init__", "__main__", "cli", "report", "demo", "py"}
    assert {part for _, part, _ in sources()} - ALLOWED.keys() - top <= {"dynamo"}


def test_nothing_below_the_top_imports_the_top():
    for name, part, tree in sources():
        if part in {"cli", "__init__", "__main__"}:
            continue
        for module, line in imported(tree):
            assert not module.startswith("stitchcache.cli"), f"{name}:{line} imports {module}"


def test_torch_free_parts_import_no_torch():
    wrong = [
        f"{name}:{line} imports {module}"
        for name, part, tree in sources()
        if part in TORCH_FREE and name != "artifact/consts.py"
        for module, line in imported(tree)
        if module.split(".")[0] == "torch"
    ]
    assert not wrong, "\n".join(wrong)


def test_private_torch_stays_in_its_places():
    wrong = []
    for name, _, tree in sources():
        if name.startswith(PRIVATE):
            continue
        wrong += [
            f"{name}:{line} imports {module}"
            for module, line in imported(tree)
            if module.startswith(PRIVATE_MODULES)
        ]
        wrong += [
            f"{name}:{node.lineno} uses {ast.unparse(node)}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith(PRIVATE_MODULES)
        ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "module",
    [
        "stitchcache",
        "stitchcache.errors",
        "stitchcache.types",
        "stitchcache.store",
        "stitchcache.cache",
        "stitchcache.nearest",
        "stitchcache.explanation",
    ],
)
def test_importing_brings_no_torch(module):
    source = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", source], check=False, cwd=ROOT.parent).returncode == 0


def test_every_import_order_works():
    """No cycle is hidden by who happens to import first."""
    for part in (
        "graph",
        "codegen",
        "keys",
        "artifact.record",
        "pieces",
        "capture",
        "plan",
        "runtime.link",
    ):
        done = subprocess.run(
            [sys.executable, "-c", f"import stitchcache.{part}"], check=False, cwd=ROOT.parent
        )
        assert done.returncode == 0, part


def test_the_package_keeps_its_own_rules():
    wrong = []
    for name, _, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Assert):
                wrong.append(f"{name}:{node.lineno} assert")
            caught = ast.unparse(node.type) if isinstance(node, ast.ExceptHandler) and node.type else "all"
            if (
                isinstance(node, ast.ExceptHandler)
                and caught in {"all", "Exception", "BaseException"}
                # Cleaning up and raising again catches nothing.
                and ast.unparse(node.body[-1]) != "raise"
            ):
                wrong.append(f"{name}:{node.lineno} catches everything")
            if isinstance(node, ast.Global):
                wrong.append(f"{name}:{node.lineno} global state")
    assert not wrong, "\n".join(wrong)
