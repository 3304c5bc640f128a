"""The benchmarks read their options, and their report makes tables of stored results; nothing is timed."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
BENCHMARKS = ["bench_warm", "bench_cold", "bench_call", "bench_threads", "bench_eager"]
BENCHMARKS += ["bench_trust", "bench_serve", "report"]
PAGE = (
    "<!-- begin warm -->\nold\n<!-- end warm -->\nkept\n<!-- begin cold -->\nold cold\n<!-- end cold -->\n"
    "<!-- begin call-cuda -->\ngpu old\n<!-- end call-cuda -->\n"
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a benchmark's module, as the scripts do: by its bare name."""
    monkeypatch.syspath_prepend(str(HERE))
    return importlib.import_module


def sample(after: float, process: float, **more: Any) -> dict[str, Any]:
    known = {"import_torch": 1.0, "build": 0.01, "imports": 0.01, "open": 0.008, "first_call": 0.002}
    known |= {"process": process, "after_build": after, "save": 0.1, "peak_mb": 230.0, "difference": 1e-7}
    return known | {"compilers": []} | more


WARM = {
    "decoder-4": {
        "eager": [sample(0.004, 1.10), sample(0.005, 1.12)],
        "stitchcache": [
            sample(0.020, 1.12, hit="direct", pieces=5, distinct=3),
            sample(0.022, 1.13, hit="direct", pieces=5, distinct=3),
        ],
        "compile": [
            sample(4.0, 6.0, compilers=["torch._dynamo"]),
            sample(4.4, 6.1, compilers=["torch._dynamo"]),
        ],
        "vllm": [sample(1.0, 3.0), sample(1.1, 3.1)],
    },
    "lookup": {"subject": "llama-32", "samples": [{"hit": "direct", "key": 0.012, "sources": 0.003}]},
}
FACTS = {
    "cpu": "A CPU",
    "cores": 2,
    "memory_gb": 8,
    "kernel": "6.1",
    "torch": "2.13.0",
    "python": "3.11",
    "seed": 0,
}


def write(directory: Path, kind: str, samples: Any, goals: Any) -> None:
    record = {"version": 1, "kind": kind, "facts": FACTS, "samples": samples, "goals": goals}
    (directory / f"{kind}.json").write_text(json.dumps(record))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_script_explains_itself_without_importing_torch(name: str) -> None:
    source = f"import sys, {name}; {name}.main(['--help'])"
    watched = f"import sys\ntry:\n exec({source!r})\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", watched], cwd=HERE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


def test_options_have_defaults_that_can_be_narrowed(bench: Any, tmp_path: Path) -> None:
    options = bench("bench_warm").options_of(
        ["--dir", str(tmp_path), "--ways", "eager,stitchcache", "--rounds", "2"]
    )
    assert (options.ways, options.rounds, options.json) == (
        ["eager", "stitchcache"],
        2,
        tmp_path / "warm.json",
    )
    assert options.subjects == ["decoder-4", "decoder-16", "minilm"]
    assert bench("bench_cold").options_of([]).layers == [2, 4, 8, 16, 32]
    assert bench("bench_call").options_of(["--quick"]).rounds == 1


def test_models_on_a_gpu_have_names_and_results_of_their_own(bench: Any, tmp_path: Path) -> None:
    asked = ["--dir", str(tmp_path), "--device", "cuda"]
    options = bench("bench_warm").options_of([*asked, "--subjects", "decoder-4x512"])
    assert (options.subjects, options.json) == (["decoder-4x512@cuda"], tmp_path / "warm-cuda.json")
    options = bench("bench_call").options_of([*asked, "--quick"])
    assert (options.subjects, options.json) == (["decoder-4x512@cuda"], tmp_path / "call-cuda.json")
    subject = bench("subjects").Subject("llama-4x512@cuda")
    assert (subject.kind, subject.layers, subject.width, subject.device) == ("llama", 4, 512, "cuda")
    assert bench("subjects").Subject("minilm").device == "cpu"
    with pytest.raises(SystemExit, match="no such model"):
        bench("subjects").Subject("decoder-4@tpu")


def test_a_gpu_is_asked_for_where_there_is_none(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
        bench("bench_call").main(["--dir", str(tmp_path), "--device", "cuda"])


def test_a_way_that_does_not_work_is_left_out_and_named(bench: Any, tmp_path: Path) -> None:
    measure = bench("measure")
    results = measure.Results(tmp_path / "warm-cuda.json", "warm")
    results.fail("decoder-4@cuda", "package", measure.FailedError("Traceback\nRuntimeError: no such thing\n"))
    assert results.working("decoder-4@cuda", ["eager", "package"]) == ["eager"]
    said = bench("report").failures(json.loads((tmp_path / "warm-cuda.json").read_text()))
    assert said == "AOTInductor package does not work for decoder-4@cuda: `RuntimeError: no such thing`"


def test_an_unknown_way_is_refused(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench("bench_warm").options_of(["--ways", "magic"])
    assert "no such way: magic" in capsys.readouterr().err


def test_goals_of_a_warm_start_are_judged(bench: Any) -> None:
    goals = {goal.name: goal for goal in bench("goals").warm_goals(WARM)}
    assert goals["decoder-4: stitchcache, after build"].value == pytest.approx(21)
    assert goals["decoder-4: stitchcache, after build"].met
    assert goals["decoder-4: torch.compile / stitchcache"].value == pytest.approx(200)
    assert not goals["decoder-4: vLLM's way / stitchcache"].met
    assert goals["llama-32: direct lookup"].value == pytest.approx(15)


def test_goals_of_cold_and_call(bench: Any) -> None:
    cold = {
        "decoder-4": {"stitchcache": [sample(20, 21)], "compile": [sample(18, 19)]},
        "decoder-32": {"stitchcache": [sample(22, 23)], "compile": [sample(90, 91)]},
    }
    assert [goal.met for goal in bench("goals").cold_goals(cold)] == [True, True, True]
    overhead = {"call_us": [2.0, 2.2], "piece_us": [0.4, 0.5], "whole_us": [50.0], "pieces": [5]}
    us = {
        "small, 1 thread": {"stitchcache": [400.0, 440.0], "vllm": [500.0, 500.0], "package": [400.0, 410.0]}
    }
    call = {"decoder-4": {"us": us, "sizes": {"small": [2, 16]}, "overhead": overhead}}
    met = {goal.name.partition(": ")[2]: goal.met for goal in bench("goals").call_goals(call)}
    assert met == {
        "stitchcache / vLLM's way": True,
        "stitchcache / AOTInductor package": False,
        "own overhead a piece": False,
        "own overhead a call": True,
    }
    table = bench("report").call_table({"samples": call})
    assert "| decoder-4 | small, 1 thread | 2 x 16        | 420             |" in table


def test_report_rewrites_what_it_has_results_for(bench: Any, tmp_path: Path) -> None:
    goals = [{"name": "a goal", "value": 21.0, "relation": "<=", "limit": 25, "unit": "ms", "met": True}]
    write(tmp_path, "warm", WARM, goals)
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert bench("report").main([str(tmp_path), "--docs", str(page), "--no-plots"]) == 0
    text = page.read_text()
    assert "\nold\n" not in text
    assert "old cold" in text
    assert "gpu old" in text
    assert "kept" in text
    assert "| decoder-4 | torch.compile | 6.05" in text
    assert "200x" in text
    assert "Medians of 2 fresh processes. 2 cores" in text
    assert "15.0 ms (12.0 for the key, 3.0 to check the sources" in text
    assert "- a goal: 21.0 ms (goal <= 25 ms): met" in text
    again = page.read_text()
    bench("report").main([str(tmp_path), "--docs", str(page), "--no-plots"])
    assert page.read_text() == again


def test_report_of_a_gpu_has_tables_without_plots_and_goals(bench: Any, tmp_path: Path) -> None:
    us = {"small": {"eager": [900.0, 910.0], "stitchcache": [300.0, 310.0]}}
    samples = {"decoder-4@cuda": {"us": us, "sizes": {"small": [2, 16]}}}
    goals = [{"name": "a goal", "value": 1.0, "relation": "<=", "limit": 1, "unit": "x", "met": True}]
    write(tmp_path, "call", samples, goals)
    record = json.loads((tmp_path / "call.json").read_text())
    record["facts"] |= {"gpu": "A GPU", "driver": "1.2"}
    (tmp_path / "call.json").rename(tmp_path / "call-cuda.json").write_text(json.dumps(record))
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert bench("report").main([str(tmp_path), "--docs", str(page), "--no-plots"]) == 0
    text = page.read_text()
    assert "gpu old" not in text
    assert "old cold" in text
    assert "One A GPU (driver 1.2); 2 cores of an A CPU" in text
    assert "| decoder-4@cuda | small | 2 x 16        | 905       | 305             |" in text
    assert "a goal" not in text
    assert "own part" not in text


def test_report_draws_each_plot_with_text_as_text(bench: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write(tmp_path, "warm", WARM, [])
    write(tmp_path, "cold", {"decoder-4": {"stitchcache": [sample(20, 21)], "compile": [sample(18, 19)]}}, [])
    drawn = bench("plots").draw_all(tmp_path, tmp_path / "plots")
    assert drawn == ["warm-after-build", "warm-process", "cold"]
    for name in drawn:
        assert (tmp_path / "plots" / f"{name}.png").stat().st_size > 1000
    assert ">stitchcache</text>" in (tmp_path / "plots" / "cold.svg").read_text()


def test_results_of_another_machine_are_not_mixed(bench: Any, tmp_path: Path) -> None:
    write(tmp_path, "warm", WARM, [])
    with pytest.raises(SystemExit, match="measured elsewhere"):
        bench("measure").Results(tmp_path / "warm.json", "warm")
    assert bench("measure").Results(tmp_path / "warm.json", "warm", again=True).samples == {}


def test_the_page_of_the_docs_has_every_marker(bench: Any) -> None:
    page = (HERE.parents[1] / "docs" / "benchmarks.md").read_text()
    texts = dict.fromkeys(("warm", "cold", "call", "warm-cuda", "call-cuda"), "new")
    assert bench("report").rewrite(page, texts).count("new\n<!-- end") == 5


def test_code_of_vllms_form_runs(bench: Any) -> None:
    """The peer's generator, over a split graph with a splitting op in the middle."""
    import functools

    import torch

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x + 1).sin() * 2

    way = bench("vllm_way")
    program = torch.export.export(Model(), (torch.randn(3),))
    split, compiled = way._split(program.graph_module, ["aten::sin"])
    code, names = way.list_code(split, compiled)
    assert "__vllm_submods__[1](" in code
    scope: dict[str, Any] = {}
    exec(code, scope)
    submods = [split.get_submodule(name) for name in names]
    x = torch.randn(3)
    (result,) = functools.partial(scope["execution_fn"], __vllm_submods__=submods)(x)
    torch.testing.assert_close(result, Model()(x))
