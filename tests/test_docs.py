"""The site is built without a warning: a broken link is one. Manifests are what Kubernetes takes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
# The oldest with image volumes on by default, and the newest that the package has.
VERSIONS = ("1.35", "1.37")


def test_the_site_is_built_without_a_warning(tmp_path):
    for package in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(package, reason="needs the extra 'docs'")
    words = [sys.executable, "-m", "sphinx", "-q", "-d", str(tmp_path / "trees"), str(DOCS), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "stitchcache inspect [OPTIONS] PREFIX" in (tmp_path / "commands.html").read_text()
    assert "stitchcache.compile_blocks" in (tmp_path / "reference.html").read_text()


def manifests():
    yaml = pytest.importorskip("yaml", reason="needs kubernetes-validate, of the extra 'test'")
    blocks = re.findall(r"^```yaml\n(.*?)^```", (DOCS / "howto-fleet.md").read_text(), re.S | re.M)
    return [manifest for block in blocks for manifest in yaml.safe_load_all(block)]


def containers(found):
    """Every container in a manifest, however deep."""
    for name, value in found.items() if isinstance(found, dict) else enumerate(found):
        if name in ("containers", "initContainers"):
            yield from value
        elif isinstance(value, (dict, list)):
            yield from containers(value)


@pytest.mark.parametrize("version", VERSIONS)
def test_manifests_are_what_kubernetes_takes(version):
    validate = pytest.importorskip(
        "kubernetes_validate", reason="needs kubernetes-validate, of the extra 'test'"
    )
    found = manifests()
    assert [each["kind"] for each in found] == ["Job", "Deployment", "DaemonSet", "CronJob"]
    for manifest in found:
        validate.validate(manifest, version, strict=True)
    found[1]["spec"]["template"]["spec"]["volumes"][0]["image"]["referense"] = "x"
    with pytest.raises(validate.ValidationError):
        validate.validate(found[1], version, strict=True)


def test_manifests_run_commands_that_there_are():
    from stitchcache.cli import commands

    ran = []
    for container in (each for manifest in manifests() for each in containers(manifest)):
        words = [*container.get("command", ()), *container.get("args", ())]
        text = " ".join(words).replace("$(JOB_COMPLETION_INDEX)", "0")
        for call in re.findall(r"stitchcache ((?:machine|check|prewarm|prune)[^>&\n]*)", text):
            name, *rest = call.split()
            command = commands.get_command(None, name)
            command.make_context(name, rest)
            ran.append(name)
        # What is mounted is there, and what is named is mounted.
        assert {mount["name"] for mount in container.get("volumeMounts", ())} <= {"cache", "node"}
    assert ran == ["prewarm", "machine", "check", "prune"]
