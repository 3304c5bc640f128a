"""Ordinary models are found directly in the next process, whatever its hash seed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TORCH_ONLY = ["builtins", "fx.wrap", "lstm", "lstm within", "gru", "custom_op", "cond"]
OTHERS = {
    "transformers": ["swin"],
    "timm": ["timm vit", "timm swin"],
    "diffusers": ["diffusers unet", "diffusers dit"],
}


def run(folder, names, seed):
    environment = {
        **os.environ,
        "PYTHONHASHSEED": seed,
        "PYTHONPATH": os.pathsep.join([str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]),
        "STITCHCACHE_DIR": str(folder),
    }
    command = [sys.executable, str(HERE / "keys_zoo.py"), *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(folder, names):
    first, second = run(folder, names, "1"), run(folder, names, "2")
    for name in names:
        assert first[name] == {"hit": None, "same": True}
        assert second[name] == {"hit": "direct", "same": True}, second["log"]


def test_models_made_of_torch(tmp_path):
    check(tmp_path, TORCH_ONLY)


@pytest.mark.parametrize("package", OTHERS)
def test_models_of_a_library(tmp_path, package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; its models are tried where it is")
    check(tmp_path, OTHERS[package])
