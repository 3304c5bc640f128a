"""Models of the semantics tests run beside their compiled form, with every backend that this run has."""

import os

import pytest
from agreement import agree

# Compiling takes seconds a piece: the full run only. What is planned is the same with eager pieces.
FULL = os.environ.get("STITCHCACHE_FULL") == "1"
BACKENDS = ["eager", *([pytest.param("aoti", marks=pytest.mark.compile)] if FULL else [])]
# Compiled sums run in another order than eager's.
TOLERANCE = {"eager": 0.0, "aoti": 2e-5}


@pytest.fixture(params=BACKENDS)
def check(request, tmp_path):
    """Compare a model with its compiled form; see ``agreement.agree``."""

    def run(model, calls, *, tolerance=0.0, **options):
        allowed = max(tolerance, TOLERANCE[request.param])
        options.setdefault("backend", request.param)
        return agree(model, calls, tmp_path, tolerance=allowed, **options)

    return run
