# %% [markdown]
# # Quickstart: grouped query attention in a Vision Transformer
#
# Train a small multi-head ViT, convert it to every variant, and look at what decides about the groups: key norms,
# allocations and attention maps. Two minutes on a CPU; a GPU or TPU runtime works as it is.

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

import jax
import matplotlib.pyplot as plt
import numpy as np

from kdgqa_jax import analysis, checkpoint, config, convert, evaluate, predict, sharding, train
from kdgqa_jax.data import sources

WORKDIR = pathlib.Path(tempfile.mkdtemp())
SOURCE = (
    ""  # a checkpoint of your own: timm, Hugging Face ("hf:org/name"), AugReg; "": train one here
)
print(jax.devices())

# %% [markdown]
# ## A multi-head ViT
#
# scikit-learn's digits, real images of 8x8 pixels. With a checkpoint of your own in `SOURCE` nothing is trained.

# %%
if not SOURCE:
    settings = config.load_config("testing:attention=mha")
    result = train.train_and_evaluate(settings, WORKDIR / "mha")
    SOURCE = str(WORKDIR / "mha" / "model")
    print(f"test top-1 {result['top1']:.2f} %")

# %% [markdown]
# ## The variants
#
# Half the key/value heads. Mean-pooling loses what the heads had apart; merging (`svd`) keeps most of it. All of them are
# evaluated as they are, without any training.

# %%
dataset = sources.load("digits")
mesh = sharding.make_mesh()
top1 = {}
for name, rule in {"gqa": "mean", "kdgqa": "mean", "dgqa_ema": "mean", "gqa merged": "svd"}.items():
    converted = convert.load(SOURCE, attention=name.split()[0], num_kv_heads=4, pooling=rule)
    converted.save(WORKDIR / name)
    preprocessing = converted.description["preprocessing"]
    step = evaluate.make_eval_step(
        converted.model, preprocessing["mean"], preprocessing["std"], mesh
    )
    top1[name] = evaluate.evaluate(step, converted.variables, dataset.test, 256, mesh)["top1"]
    print(f"{name:12} {top1[name]:6.2f} %")

# %%
assert top1["gqa merged"] > top1["gqa"] + 20  # what merging is for
assert top1["dgqa_ema"] == top1["gqa"]  # its groups are equal until it is trained

# %% [markdown]
# ## What decides about the groups
#
# `analysis.capture` runs a model on images and keeps what its layers computed.

# %%
model, variables, description = checkpoint.load_model(WORKDIR / "kdgqa")
images = np.stack([dataset.test[i]["image"] for i in range(64)]).astype(np.float32) / 255
images = (images - 0.5) / 0.5
seen = jax.jit(analysis.capture, static_argnums=0)(model, variables, images)
layers, heads, kv_heads = len(seen.allocation), model.attention.num_heads, seen.allocation.shape[1]
assert (np.asarray(seen.allocation).sum(axis=1) == heads).all()

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
for k in range(kv_heads):
    left.bar(np.arange(layers) + 0.2 * k, seen.key_norm[:, k], 0.2, label=f"head {k}")
    below = np.asarray(seen.allocation)[:, :k].sum(axis=1)
    right.bar(np.arange(layers), seen.allocation[:, k], bottom=below)
left.set(title="Key norms", xlabel="layer")
right.set(title="Query heads per key/value head", xlabel="layer", yticks=range(heads + 1))
left.legend()
plt.show()

# %% [markdown]
# Attention maps of the class token in the last layer: where each query head looks, and which key/value head it uses.

# %%
rows, columns = model.grid
figure, grid = plt.subplots(1, heads, figsize=(1.6 * heads, 2), layout="constrained")
for n, axes in enumerate(grid):
    axes.imshow(seen.maps[-1, 0, n, 0, model.num_prefix_tokens :].reshape(rows, columns))
    axes.set(title=f"{n} uses {seen.group_index[-1, n]}", xticks=[], yticks=[])
plt.show()
np.testing.assert_allclose(np.asarray(seen.maps).sum(axis=-1), 1, atol=1e-5)

# %% [markdown]
# ## Predictions

# %%
logits = predict.predict_array(model, variables, images).logits
names = description["class_names"]
print("predicted", [names[i] for i in logits.argmax(axis=-1)[:10]])
print("labels   ", [names[dataset.test[i]["label"]] for i in range(10)])
np.testing.assert_allclose(logits, seen.logits, rtol=1e-3, atol=1e-3)
