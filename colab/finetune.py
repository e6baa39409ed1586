# %% [markdown]
# # Fine-tuning: from a multi-head checkpoint to grouped variants
#
# The paper's protocol in small: a multi-head ViT is converted to each variant, uptrained for a few steps on the same data,
# and compared. Three minutes on a CPU with scikit-learn's digits; with `DATASET`, `INIT` and `STEPS` of your own it is
# a real run on a GPU or TPU runtime.

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

from kdgqa_jax import checkpoint, config, logs, train

WORKDIR = pathlib.Path(tempfile.mkdtemp())
INIT = ""  # a multi-head checkpoint; "": train one here
DATASET = "digits"  # or folder:PATH, cifar10, ...: docs/data.md
VARIANTS = ("gqa", "kdgqa", "dgqa_ema")
STEPS = 60


def settings(attention, **changes):
    """A run of the testing recipe; `config.train_config()` documents every field."""
    result = config.load_config(f"testing:attention={attention}")
    result.data.name = DATASET
    result.update_from_flattened_dict({"model.window": 10, "log_every": 5, **changes})
    return result


# %% [markdown]
# ## The checkpoint

# %%
if not INIT:
    base = train.train_and_evaluate(settings("mha"), WORKDIR / "mha")
    INIT = str(WORKDIR / "mha" / "model")
    print(f"mha: {base['top1']:.2f} %")

# %% [markdown]
# ## Convert and uptrain
#
# `init` names the checkpoint; another variant or number of key/value heads converts it when the run starts. A run that is
# interrupted resumes when the cell is run again.

# %%
results = {}
for name in VARIANTS:
    epochs = STEPS * 64 / 1437
    changes = {"init": INIT, "model.num_kv_heads": 4, "epochs": epochs, "eval_every_epochs": 0.0}
    changes["optim.learning_rate"] = 1e-3
    results[name] = train.train_and_evaluate(settings(name, **changes), WORKDIR / name, name)

# %% [markdown]
# ## Curves

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
for name in VARIANTS:
    records = [r for r in logs.read_metrics(WORKDIR / name) if r["split"] == "train"]
    steps = [r["step"] for r in records]
    left.plot(steps, [r["loss"] for r in records], label=name)
    right.plot(steps, [np.sum(r["idle_kv_heads"]) for r in records], label=name)
left.set(title="Loss", xlabel="step")
right.set(title="Idle key/value heads, all layers", xlabel="step")
left.legend()
plt.show()

# %% [markdown]
# ## The table
#
# One seed says little: `kdgqa study` repeats this over seeds, with intervals and tests.

# %%
print(f"{'variant':10} {'top-1 %':>8} {'loss':>7}  allocation of layer 0")
for name, result in results.items():
    allocation = " ".join(map(str, result["allocation"][0]))
    print(f"{name:10} {result['top1']:8.2f} {result['loss']:7.3f}  {allocation}")
for name, result in results.items():
    model, _, _ = checkpoint.load_model(WORKDIR / name / "model")
    assert model.attention.variant == name and model.attention.num_kv_heads == 4
    assert result["top1"] > 80, name
    assert (np.sum(result["allocation"], axis=1) == model.attention.num_heads).all()
