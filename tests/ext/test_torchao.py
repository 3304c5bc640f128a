"""Weights that torchao quantizes: bound by their parts, equal to torchao's own run, hits afterwards."""

import os

import pytest

pytest.importorskip("torchao")

SOURCE = """
    import json, torch
    import torchao.quantization as ao
    import stitchcache
    from stitchcache import Dim

    kinds = {
        "int8": lambda: ao.Int8WeightOnlyConfig(),
        "int8 dynamic": lambda: ao.Int8DynamicActivationInt8WeightConfig(),
        "int4": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32)),
        "int8 dynamic, int4": lambda: ao.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=ao.PerGroup(32)
        ),
        "float8": lambda: ao.Float8WeightOnlyConfig(),
    }
    said = {}
    for kind in KINDS:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32)).eval()
        ao.quantize_(model, kinds[kind]())
        x = torch.linspace(-1, 1, 6 * 32).view(6, 32)
        shapes = ({0: Dim("rows", 2, 64)},)
        compiled = stitchcache.compile(model, (x,), dynamic_shapes=shapes, backend=BACKEND)
        differs = []
        for rows in (x, x[:2], torch.cat([x, -x])):
            with torch.no_grad():
                want = model(rows)
                differs.append(float((compiled(rows) - want).abs().max() / want.abs().max()))
        names = [binding.name for binding in compiled.artifact.bindings]
        plain = all("torchao" not in variant.code for variant in compiled.artifact.variants)
        said[kind] = [compiled.cache_hit, max(differs), compiled.check.state, plain]
        said[kind] += [len(compiled.artifact.pieces), str(compiled.explain()), names]
    print(json.dumps(said))
"""
KINDS = ("int8", "int8 dynamic", "int4", "int8 dynamic, int4", "float8")
FULL = [pytest.param("aoti", marks=pytest.mark.compile)] if os.environ.get("STITCHCACHE_FULL") else []


@pytest.mark.parametrize("backend", ["eager", *FULL])
def test_quantized_models_hit_in_the_next_process(fresh_process, backend):
    source = SOURCE.replace("KINDS", repr(KINDS)).replace("BACKEND", repr(backend))
    # int4 and dynamic kinds read a global set of dtypes, FP8_TYPES, whose order is another in each process.
    for hits in ((None,), ("direct", "graph")):
        for kind, (found, differs, state, plain, pieces, why, names) in fresh_process(source).items():
            assert found in hits, f"{kind}: {why}"
            assert differs < (1e-6 if backend == "eager" else 1e-4), kind
            # Nothing of torchao runs between pieces.
            assert (state, plain, pieces) == ("agreed", True, 1), kind
            assert any(name.startswith("0.weight.") for name in names), kind
