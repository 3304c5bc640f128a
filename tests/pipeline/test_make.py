"""Seconds left: from this run's pieces, else unknown."""

from __future__ import annotations

import pytest

from stitchcache.api.progress import left_text
from stitchcache.pipeline.make import seconds_left


def test_seconds_left_come_from_the_pieces_of_this_run():
    assert seconds_left(2, [], 0.0) is None
    assert seconds_left(2, [100.0], 0.0) == 200
    assert seconds_left(2, [100.0, 300.0], 50.0) == 350
    assert seconds_left(1, [1.0], 2.0) is None, "it takes longer than expected"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.2, "about 1 s left"), (7.4, "about 7 s left"), (23, "about 25 s left"), (200, "about 3 min left")],
)
def test_an_estimate_is_no_finer_than_it_is(seconds, said):
    assert left_text(seconds) == said
