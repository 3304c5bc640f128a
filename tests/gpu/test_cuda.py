"""On a GPU: CUDA graphs, streams and threads, weights that change or move, and other processes."""

from __future__ import annotations

import textwrap
import threading

import gpu_models
import pytest
import torch

import stitchcache
from stitchcache import CudaGraphs
from stitchcache.report.profile import profile

pytestmark = [pytest.mark.gpu, pytest.mark.compile]

LAYERS, WIDTH = 2, 256


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return stitchcache.Cache(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="module")
def start(cache):
    def start(graphs=None, model=None, check="example"):
        model = model or gpu_models.decoder(LAYERS, WIDTH)
        example = gpu_models.call(8)
        compiled = stitchcache.compile(
            model, example, cache=cache, cuda_graphs=graphs, check=check, **gpu_models.options()
        )
        return model, compiled

    start()
    return start


def close(got, want):
    assert got.shape == want.shape
    scale = want.abs().max()
    assert float((got - want).abs().max() / scale) < 0.03


MODES = [None, CudaGraphs(), CudaGraphs(mode="whole"), CudaGraphs(inside=[gpu_models.ATTENTION])]


@pytest.mark.parametrize("graphs", MODES, ids=["none", "pieces", "whole", "inside"])
def test_every_call_is_eagers(start, graphs):
    model, compiled = start(graphs)
    twin = gpu_models.decoder(LAYERS, WIDTH)
    with torch.no_grad():
        for number in range(30):
            ids, positions = gpu_models.call((8, 5, 16)[number % 3], seed=number)
            close(compiled(ids, positions), twin(ids, positions))
            if number % 10 == 9:
                for one in (model, twin):
                    for parameter in one.parameters():
                        parameter.mul_(1.05)
        for ours, theirs in zip(model.buffers(), twin.buffers(), strict=True):
            close(ours, theirs)
    count = {"pieces": LAYERS + 1, "whole": 1}
    for record in compiled.graphs:
        assert record.reason == ""
        assert record.graphs == (1 if graphs.inside else count[graphs.mode])
        assert record.seconds > 0
    assert len(compiled.graphs) == (0 if graphs is None else 3)
    assert ("graphs" in compiled.timings) == (graphs is not None)


def test_a_weight_that_was_moved_is_seen(start):
    model, compiled = start(CudaGraphs(mode="whole"))
    ids, positions = gpu_models.call(8)
    with torch.no_grad():
        for _ in range(3):
            compiled(ids, positions)
        model.head.weight.data = model.head.weight.data.flip(0).clone()
        for _ in range(4):
            close(compiled(ids, positions), model(ids, positions))
        other = gpu_models.decoder(LAYERS, WIDTH)
        other.embedding.weight.mul_(2)
        compiled.rebind(other)
        for _ in range(4):
            close(compiled(ids, positions), other(ids, positions))


def test_streams_and_threads(start):
    # The cache is written, so each call has to be whole: all write the same at one size.
    model, compiled = start(CudaGraphs(mode="whole"))
    given = [gpu_models.call(8, seed=seed) for seed in range(4)]
    with torch.no_grad():
        wanted = [model(*each) for each in given]
    torch.cuda.synchronize()
    wrong = []

    def work(number):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                out = compiled(*given[number])
                torch.cuda.current_stream().synchronize()
                if not float((out - wanted[number]).abs().max() / wanted[number].abs().max()) < 0.03:
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_without_graphs_threads_run_side_by_side(cache):
    rows = stitchcache.Dim("rows", min=2, max=64)
    model = (
        torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)).cuda().eval()
    )
    x = torch.randn(4, 64, device="cuda")
    compiled = stitchcache.compile(model, (x,), dynamic_shapes={"input": {0: rows}}, cache=cache)
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(100):
                x = torch.randn(int(torch.randint(2, 64, (), generator=generator)), 64, generator=generator)
                x = x.cuda()
                if not torch.allclose(compiled(x), model(x), atol=1e-3):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_all_sizes_are_recorded_at_load_and_state_is_put_back(start):
    model = gpu_models.decoder(LAYERS, WIDTH)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.normal_()
        before = [buffer.clone() for buffer in model.buffers()]
        _, compiled = start(CudaGraphs([4, 8, 32], mode="whole", at="load"), model)
        assert [record.sizes[0] for record in compiled.graphs] == [(8,), (32,), (4,)]
        for ours, theirs in zip(model.buffers(), before, strict=True):
            assert torch.equal(ours, theirs)


def test_results_that_are_kept_are_written_again(start):
    _, compiled = start(CudaGraphs([8], mode="whole", outputs="kept"))
    with torch.no_grad():
        first, second = (compiled(*gpu_models.call(8, seed=seed)) for seed in (1, 2))
    assert first.data_ptr() == second.data_ptr()


@pytest.fixture
def custom(cache):
    """Compile a model around a custom op that runs a Python function."""
    library = torch.library.Library("stitchgpucustom", "DEF")
    library.define("run(Tensor x) -> Tensor")
    library.impl("run", lambda x: torch.empty_like(x), "Meta")

    class Around(torch.nn.Module):
        def forward(self, x):
            return torch.ops.stitchgpucustom.run(x * 2) + 1

    def make(function, graphs):
        library.impl("run", function, "CUDA")
        model, x = Around().eval(), torch.ones(4, device="cuda")
        options = {"cache": cache, "splitting_ops": ["stitchgpucustom::run"]}
        return model, stitchcache.compile(model, (x,), cuda_graphs=graphs, **options)

    yield make
    library._destroy()


def test_a_recorded_op_that_counts_in_python_is_refused_by_the_look(custom):
    calls = []

    def count(x):
        calls.append(None)
        return x + float(len(calls) % 7)

    with pytest.raises(stitchcache.errors.StitchCacheError):
        custom(count, CudaGraphs(mode="whole"))


def test_what_cannot_be_recorded_leaves_nothing_behind(custom, start):
    def reads(x):
        return x + x.sum().item()

    model, compiled = custom(reads, CudaGraphs(mode="whole"))
    assert "capturing" in compiled.graphs[0].reason
    x = torch.full((4,), 3.0, device="cuda")
    for _ in range(4):
        assert torch.equal(compiled(x), model(x))
    # Random numbers, memory and other recordings work.
    assert torch.rand(8, device="cuda").unique().numel() == 8
    _, other = start(CudaGraphs(mode="whole"))
    with torch.no_grad():
        for _ in range(3):
            other(*gpu_models.call(8))
    assert [record.reason for record in other.graphs] == [""]


def test_outside_of_graphs_an_op_may_do_what_it_likes(custom):
    model, compiled = custom(lambda x: x + x.sum().item(), CudaGraphs())
    for number in range(4):
        x = torch.full((4,), float(number), device="cuda")
        assert torch.equal(compiled(x), model(x))
    assert compiled.graphs[0].graphs == 2


def test_the_caller_may_record_calls_itself(start):
    model, compiled = start()
    ids, positions = gpu_models.call(8)
    with torch.no_grad():
        for _ in range(3):
            compiled(ids, positions)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = compiled(ids, positions)
        ids.copy_(gpu_models.call(8, seed=5)[0])
        graph.replay()
        close(out, model(ids, positions))


WARM = """
    import json, sys, torch
    import gpu_models, stitchcache
    model, example = gpu_models.decoder({layers}, {width}), gpu_models.call(8)
    compiled = stitchcache.compile(
        model, example, cache=stitchcache.Cache({root!r}), require="direct",
        cuda_graphs=stitchcache.CudaGraphs([8], mode={mode!r}), **gpu_models.options()
    )
    with torch.no_grad():
        for _ in range(4):
            out = compiled(*example)
        apart = float((out - model(*example)).abs().max())
    names = [n for n in ("torch._dynamo", "torch._inductor", "triton") if n in sys.modules]
    print(json.dumps(dict(hit=compiled.cache_hit, apart=apart, names=names, graphs=len(compiled.graphs))))
"""


@pytest.mark.parametrize("mode", ["whole", "pieces"])
def test_a_direct_hit_with_graphs_imports_no_compiler(start, cache, fresh_process, mode, request):
    source = WARM.format(layers=LAYERS, width=WIDTH, root=str(cache.root), mode=mode)
    here = f"import sys; sys.path.insert(0, {str(request.path.parent)!r})"
    found = fresh_process(f"{here}\n{textwrap.dedent(source)}")
    assert found["hit"] == "direct"
    assert found["names"] == []
    assert found["graphs"] == 1
    assert found["apart"] < 0.2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("graphs", [None, CudaGraphs(), CudaGraphs(mode="whole")])
def test_an_entry_serves_a_gpu_of_another_index(start, cache, graphs):
    start()
    model = gpu_models.decoder(LAYERS, WIDTH, "cuda:1")
    compiled = stitchcache.compile(
        model,
        gpu_models.call(8, "cuda:1"),
        cache=cache,
        cuda_graphs=graphs,
        require="direct",
        **gpu_models.options(),
    )
    # The current device is another one for half of the calls.
    with torch.no_grad():
        for number in range(6):
            call = gpu_models.call(8, "cuda:1", seed=number)
            with torch.cuda.device(number % 2):
                out = compiled(*call)
                assert (out.device.index, torch.cuda.current_device()) == (1, number % 2)
            close(out, model(*call))


def test_a_profile_lists_the_kernels_of_pieces(start, cache):
    _, compiled = start()
    found = profile(cache, compiled.graph_hash, {"s0": 8})
    fused = [row for row in found["ops"] if row["op"].startswith("triton_")]
    assert {row["piece"] for row in fused} == {piece["key"] for piece in found["pieces"]}
    assert all(0 < row["seconds"] < found["seconds"] for row in fused)
    # The attention between pieces is torch's own kernels: they count once, in their ops.
    assert not [row for row in found["ops"] if not row["piece"] and "::" not in row["op"]]
