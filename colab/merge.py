# %% [markdown]
# # Merging key/value heads
#
# How much accuracy is lost when a trained model gets fewer key/value heads, without any training afterwards: heads pooled
# by their mean, merged by joint low rank (`svd`), and merged with refitted output projections. Two minutes on a CPU.

# %%
import importlib.util
import subprocess
import sys

PACKAGE = "kdgqa-jax[demo]"  # or a checkout: its folder, or git+URL
if importlib.util.find_spec("kdgqa_jax") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", PACKAGE], check=True)

# %%
import pathlib
import tempfile

import matplotlib.pyplot as plt
import numpy as np

from kdgqa_jax import config, convert, evaluate, sharding, train
from kdgqa_jax.data import sources

WORKDIR = pathlib.Path(tempfile.mkdtemp())
SOURCE = ""  # a checkpoint of your own, with calibration images of its size in `images` below
dataset = sources.load("digits")

# %%
if not SOURCE:
    train.train_and_evaluate(config.load_config("testing:attention=mha"), WORKDIR / "mha")
    SOURCE = str(WORKDIR / "mha" / "model")
images = np.stack([dataset.train[i]["image"] for i in range(256)]).astype(np.float32) / 255
images = (images - 0.5) / 0.5  # as the model has them

# %% [markdown]
# ## Accuracy by number of key/value heads

# %%
RULES = {
    "mean": {"pooling": "mean"},
    "svd": {"pooling": "svd", "calibration": images},
    "svd and refit": {"pooling": "svd", "calibration": images, "refit": True},
}
mesh = sharding.make_mesh()


def top1(converted):
    """Test top-1 of a model as it is."""
    preprocessing = converted.description["preprocessing"]
    step = evaluate.make_eval_step(
        converted.model, preprocessing["mean"], preprocessing["std"], mesh
    )
    return evaluate.evaluate(step, converted.variables, dataset.test, 256, mesh)["top1"]


counts = (8, 4, 2, 1)
found = {
    rule: [
        top1(convert.load(SOURCE, attention="gqa", num_kv_heads=k, **(options if k < 8 else {})))
        for k in counts
    ]
    for rule, options in RULES.items()
}
for rule, values in found.items():
    print(
        f"{rule:14}", "  ".join(f"K={k}: {x:5.2f} %" for k, x in zip(counts, values, strict=True))
    )

# %%
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
for rule, values in found.items():
    axes.plot([str(k) for k in counts], values, "o-", label=rule)
axes.set(xlabel="key/value heads (8 query heads)", ylabel="test top-1, %")
axes.legend()
plt.show()
assert len({values[0] for values in found.values()}) == 1  # as many heads as before: nothing lost
assert found["svd"][1] > found["mean"][1] + 10

# %% [markdown]
# ## What the conversion says about it
#
# The energy kept predicts the loss; `kdgqa inspect --suggest-kv-heads 0.99` says how few heads would do.

# %%
converted = convert.load(SOURCE, attention="gqa", num_kv_heads=4, **RULES["svd"])
for note in converted.report.notes:
    print("-", note)
