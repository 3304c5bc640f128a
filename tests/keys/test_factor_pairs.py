# ruff: noqa: E501 - a table reads best with one line for each factor
"""Each factor that docs/keys.md lists: one change that moves it and is named, one that does not."""

import decimal
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

from stitchcache import torchside
from stitchcache.explanation import explain_differences
from stitchcache.keys import environment as environment_module, target_key
from stitchcache.options import SizeRange

DOCS = Path(__file__).parents[2] / "docs" / "keys.md"
HERE = __name__


@dataclass
class Config:
    rate: float = 0.5
    name_or_path: str = "a"


class Net(nn.Module):
    FLAG = 1

    def __init__(self, value=1):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("mean", torch.zeros(2))
        self.value = value
        self.config = Config()

    def forward(self, x):
        return self.linear(x)


def dims(low=2):
    return {"x": {0: Dim("a", min=low, max=64)}, "y": {0: Dim("b", min=2, max=64)}}


def key(model=None, **changes):
    rows = torch.ones(3, 2), torch.ones(5, 2)
    given = {
        "model": model or Net().eval(),
        "leaves": list(zip("xy", rows, strict=True)),
        "tree": "tree",
        "dynamic_shapes": dims(),
        "splitting_ops": ["aten::mm", "aten::add"],
        "size_ranges": None,
        "backend": "inductor",
        "options": {"max_autotune": False},
        "key_factors": {"revision": 1},
    }
    return target_key(**{**given, **changes})


def leaves(*tensors):
    return {"leaves": list(zip("xy", tensors, strict=True))}


def edited(edit):
    """A model that was changed by a statement."""

    def change(mp):
        model = Net().eval()
        edit(model)
        return {"model": model}

    return change


def patched(owner, name, value):
    def change(mp):
        mp.setattr(owner, name, value)
        return {}

    return change


def given(**changes):
    return lambda mp: changes


def variable(name, value="odd"):
    def change(mp):
        mp.setenv(name, value)
        return {}

    return change


def called(function, value, restore):
    """Set something of torch's; the test restores it."""

    def change(mp):
        function(value)
        mp.undo_later(lambda: function(restore))
        return {}

    return change


def rounded(mp):
    """This thread rounds decimal numbers sooner."""
    before = decimal.getcontext().copy()
    decimal.getcontext().prec = 5
    mp.undo_later(lambda: decimal.setcontext(before))
    return {}


def elsewhere(mp):
    """Another host, user, home, directory, device order and number of threads."""
    for name in ("HOME", "HOSTNAME", "USER", "LOGNAME", "TMPDIR", "PWD", "CUDA_VISIBLE_DEVICES_NOTE"):
        mp.setenv(name, "/elsewhere")
    mp.chdir("/")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    mp.undo_later(lambda: torch.set_num_threads(threads))
    torch.manual_seed(4)
    return {}


def gpu(mp, found="sm_90", cuda="12.8"):
    """A machine with GPUs, as far as keys look."""
    mp.setattr(environment_module, "_gpu", lambda: found)
    mp.setattr(torch.version, "cuda", cuda)
    mp.setattr("stitchcache.keys.devices_of", lambda model, leaves: (torch.device("cpu"), ("cpu", "cuda")))
    return {}


def share(model):
    model.register_buffer("view", model.mean[1:])


def same_mean(mp):
    return edited(lambda model: model.register_buffer("mean", torch.ones(2)))(mp)


def forward_pre_hook(module, args):
    return args


def again(x):
    return x


def reordered(model):
    model.config.__dict__ = dict(reversed(model.config.__dict__.items()))


def halves(mp):
    """Two arguments of one memory."""
    whole = torch.ones(8, 2)
    return leaves(whole[:3], whole[2:7])


class Option:
    RATE = 1


def renamed_comment(mp):
    """A second object of equal contents under another id."""
    return edited(lambda model: setattr(model, "value", int("1")))(mp)


def odd_dtype(mp):
    return leaves(torch.ones(3, 2, dtype=torch.float64), torch.ones(5, 2))


def one_tensor(mp):
    x = torch.ones(3, 2)
    return leaves(x, x)


EQUAL = leaves(torch.ones(4, 2), torch.ones(4, 2))
OTHER_SIZES = leaves(torch.ones(7, 2), torch.ones(9, 2))
VALUES = leaves(torch.zeros(3, 2), torch.randn(5, 2))
CODE = f"model.code.{HERE}"
ATTRIBUTE = f"model.attributes.{HERE}.Net.value"

# As docs/keys.md writes a factor: (its name here, what changes it, what does not).
PAIRS = {
    "options.backend": ("options.backend", given(backend="eager"), elsewhere),
    "options.backend.NAME": ("options.backend.max_autotune", given(options={"max_autotune": True}), elsewhere),
    "options.splitting_ops": (
        "options.splitting_ops",
        given(splitting_ops=["aten::mm"]),
        given(splitting_ops=("aten::add", "aten::mm", "aten::mm")),
    ),
    "options.size_ranges": ("options.size_ranges", given(size_ranges=[SizeRange(1, 4)]), given(size_ranges=())),
    "user.NAME": ("user.revision", given(key_factors={"revision": 2}), given(key_factors={"revision": int("1")})),
    "env.schema": ("env.schema", patched(environment_module, "SCHEMA_VERSION", 99), elsewhere),
    "env.torch": ("env.torch", patched(torch.version, "git_version", "other"), elsewhere),
    "env.numpy": ("env.numpy", patched(sys.modules["numpy"], "__version__", "0"), elsewhere),
    "env.platform": ("env.platform", patched(sys, "byteorder", "other"), elsewhere),
    "env.variables": ("env.variables", variable("TRITON_F32_DEFAULT"), variable("TORCHINDUCTOR_CACHE_DIR")),
    "env.op_libraries": (
        "env.op_libraries",
        patched(torch.ops, "loaded_libraries", {__file__}),
        patched(torch.ops, "loaded_libraries", set()),
    ),
    "env.cpu": ("env.cpu", patched(environment_module, "_cpu_flags", lambda: iter(["avx2"])), elsewhere),
    "env.libc": ("env.libc", patched(environment_module, "_libc", lambda: "glibc 9"), elsewhere),
    "env.cxx_abi": ("env.cxx_abi", patched(torch, "compiled_with_cxx11_abi", lambda: "other"), elsewhere),
    "env.python": ("env.python", patched(environment_module, "python_version", lambda: "other"), elsewhere),
    "code.decimal": ("code.decimal", rounded, elsewhere),
    "code.numpy": (
        "code.numpy", called(lambda digits: sys.modules["numpy"].set_printoptions(precision=digits), 3, 8), elsewhere),
    "code.python": ("code.python", patched(environment_module, "python_code", str), elsewhere),
    "env.cuda": ("env.cuda", lambda mp: gpu(mp, cuda="13.0"), gpu),
    "env.gpu": ("env.gpu", lambda mp: gpu(mp, found="sm_100"), gpu),
    "torch.default_dtype": (
        "torch.default_dtype", called(torch.set_default_dtype, torch.float64, torch.float32), elsewhere),
    "torch.default_device": ("torch.default_device", called(torch.set_default_device, "meta", None), elsewhere),
    "torch.autocast": (
        "torch.autocast", called(lambda on: torch.set_autocast_enabled("cpu", on), True, False), elsewhere),
    "torch.float32_precision": (
        "torch.float32_precision", called(torch.set_float32_matmul_precision, "high", "highest"), elsewhere),
    "torch.reduced_precision": (
        "torch.reduced_precision",
        called(
            lambda on: setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", on), False, True
        ),
        elsewhere,
    ),
    "torch.denormals": ("torch.denormals", called(torch.set_flush_denormal, True, False), elsewhere),
    "torch.deterministic": (
        "torch.deterministic", called(torch.use_deterministic_algorithms, True, False), elsewhere),
    "torch.backends": ("torch.backends", called(torch.backends.mha.set_fastpath_enabled, False, True), elsewhere),
    "torch.attention": ("torch.attention", called(torch.backends.cuda.enable_flash_sdp, False, True), elsewhere),
    "torch.inductor": (
        "torch.inductor",
        patched(torchside, "changed_inductor_settings", lambda: {"cpp.simdlen": 8}),
        elsewhere,
    ),
    "torch.patched": (
        "torch.patched",
        patched(torch.nn.functional, "gelu", again),
        patched(torch.nn.functional, "gelu", torch.nn.functional.gelu),
    ),
    "input.tree": ("input.tree", given(tree="other"), given(tree="".join("tree"))),
    "input.dynamic_shapes": (
        "input.dynamic_shapes",
        given(dynamic_shapes=dims(low=3)),
        given(dynamic_shapes=dict(reversed(dims().items()))),
    ),
    "input.POSITION.PATH": ("input.0.x", odd_dtype, given(**VALUES)),
    "input.equal_sizes": ("input.equal_sizes", given(**EQUAL), given(**OTHER_SIZES)),
    "input.aliases": ("input.aliases", one_tensor, given(**VALUES)),
    "input.memory": ("input.memory", halves, elsewhere),
    "code.classes.MODULE": (
        f"code.classes.{HERE}",
        given(key_factors={"revision": 1, "kind": Option}),
        edited(lambda m: setattr(m, "config", Config())),
    ),
    "model.attribute_order": (
        "model.attribute_order",
        edited(lambda m: setattr(m, "value", m.__dict__.pop("value"))),
        edited(lambda m: setattr(m, "value", int("1"))),
    ),
    "model.config_order": ("model.config_order", edited(reordered), edited(lambda m: setattr(m, "config", Config()))),
    "model.class": ("model.class", lambda mp: {"model": nn.Sequential(Net()).eval()}, same_mean),
    "model.tree": ("model.tree", edited(lambda m: m.add_module("more", nn.Identity())), same_mean),
    "model.training": ("model.training", edited(lambda m: m.linear.train()), same_mean),
    "model.parameters": (
        "model.parameters",
        edited(lambda m: m.linear.weight.requires_grad_(False)),
        edited(lambda m: nn.init.zeros_(m.linear.weight)),
    ),
    "model.buffers": ("model.buffers", edited(lambda m: m.register_buffer("b", torch.ones(1))), same_mean),
    "model.aliases": ("model.aliases", edited(share), same_mean),
    "model.tensor_attributes": (
        "model.tensor_attributes",
        edited(lambda m: setattr(m.linear.weight, "note", 1)),
        edited(lambda m: setattr(m.linear.weight, "_is_hf_initialized", True)),
    ),
    "model.hooks": (
        "model.hooks",
        edited(lambda m: m.register_forward_pre_hook(forward_pre_hook)),
        edited(lambda m: m.register_forward_pre_hook(forward_pre_hook).remove()),
    ),
    "model.config.FIELD": (
        "model.config.rate",
        edited(lambda m: setattr(m.config, "rate", 0.9)),
        edited(lambda m: setattr(m, "config", Config())),
    ),
    "model.attributes.CLASS.NAME": (ATTRIBUTE, edited(lambda m: setattr(m, "value", 2)), renamed_comment),
    "model.torch_classes": (
        "model.torch_classes",
        patched(nn.Linear, "forward", lambda self, x: x),
        patched(nn.Linear, "forward", nn.Linear.forward),
    ),
    "model.code.MODULE": (CODE, patched(Net, "FLAG", 2), same_mean),
}  # fmt: skip


@pytest.fixture
def mp(monkeypatch):
    undo = []
    monkeypatch.undo_later = undo.append
    yield monkeypatch
    for step in reversed(undo):
        step()


def listed():
    """Names of factors in the tables of docs/keys.md."""
    section = DOCS.read_text().partition("## Factors")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [name for cell in cells for name in re.findall(r"`([a-z0-9_]+\.[A-Za-z0-9_.]+)`", cell)]


def test_every_factor_of_the_page_has_a_pair_and_no_other_has():
    assert len(listed()) == len(set(listed()))
    assert sorted(listed()) == sorted(PAIRS)


@pytest.mark.parametrize("documented", PAIRS)
def test_a_change_moves_the_key_and_is_named(documented, mp):
    name, change, _ = PAIRS[documented]
    if name in {"env.cuda", "env.gpu"}:
        gpu(mp)
    before = key()
    changes = change(mp)
    after = key(**changes)
    assert before.key is not None, before.reason
    assert after.key is not None, after.reason
    assert after.key != before.key
    assert name in explain_differences(before.factors, after.factors)


@pytest.mark.parametrize("documented", PAIRS)
def test_what_does_not_matter_to_it_leaves_the_key(documented, mp):
    name, _, harmless = PAIRS[documented]
    if name in {"env.cuda", "env.gpu"}:
        gpu(mp)
    before = key()
    after = key(**harmless(mp))
    assert explain_differences(before.factors, after.factors) == {}
    assert after.key == before.key is not None


def test_the_code_makes_no_factor_that_the_page_does_not_list(mp):
    gpu(mp)
    patterns = [re.compile(re.sub(r"[A-Z]{3,}", ".+", name.replace(".", r"\."))) for name in listed()]
    unknown = [f.name for f in key().factors if not any(p.fullmatch(f.name) for p in patterns)]
    assert unknown == []
