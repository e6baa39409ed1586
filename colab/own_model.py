# %% [markdown]
# # The layer and the rule in a model of your own
#
# Only the attention layer, inside somebody else's Flax model: in linen, and in NNX through its bridge. The memory of DGQA
# lives in the collection `norm_stats`; training passes `step` and carries the collection along.

# %%
import importlib.util
import subprocess
import sys

PACKAGE = "kdgqa-jax[demo]"  # or a checkout: its folder, or git+URL
if importlib.util.find_spec("kdgqa_jax") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", PACKAGE], check=True)

# %%
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from sklearn.datasets import load_digits

from kdgqa_jax import allocation, attention, options, rules

# %% [markdown]
# ## In linen


# %%
class Classifier(nn.Module):
    """Patches of an image, two layers of attention, a head."""

    config: attention.AttentionConfig

    @nn.compact
    def __call__(self, x, train=False, step=None):
        x = nn.Dense(32)(x) + self.param("position", nn.initializers.normal(0.1), (16, 32))
        for i in range(2):
            layer = attention.GroupedQueryAttention(self.config, name=f"attention_{i}")
            x = x + layer(nn.LayerNorm()(x), train=train, step=step)
        return nn.Dense(10)(x.mean(axis=1))


config = attention.configure("dgqa_ema", num_heads=8, num_kv_heads=4, window=5)
model = Classifier(config)
digits = load_digits()
images = digits.images.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 4) / 16
labels = digits.target
variables = jax.jit(model.init)(jax.random.key(0), images[:1])
params, memory = variables["params"], variables["norm_stats"]
optimizer = optax.adam(3e-3)


@jax.jit
def update(params, memory, opt_state, step, x, y):
    """One step; the memory is state, not a parameter."""

    def loss(params):
        logits, new = model.apply(
            {"params": params, "norm_stats": memory},
            x,
            train=True,
            step=step,
            mutable=["norm_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean(), new["norm_stats"]

    (value, memory), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, opt_state = optimizer.update(grads, opt_state)
    return optax.apply_updates(params, updates), memory, opt_state, value


opt_state, rng = optimizer.init(params), np.random.default_rng(0)
for step in range(500):
    batch = rng.integers(0, 1500, 64)
    params, memory, opt_state, value = update(
        params, memory, opt_state, step, images[batch], labels[batch]
    )
logits = jax.jit(model.apply)({"params": params, "norm_stats": memory}, images[1500:])
accuracy = (logits.argmax(axis=-1) == labels[1500:]).mean()
print(f"test accuracy {accuracy:.1%}")
print("query heads per key/value head:", memory["attention_0"]["allocation"])
assert accuracy > 0.8
assert memory["attention_0"]["allocation"].sum() == 8

# %% [markdown]
# ## In NNX
#
# `nnx.bridge.ToNNX` wraps the layer; its parameters and memory are variables of the NNX module.

# %%
layer = nnx.bridge.ToNNX(attention.GroupedQueryAttention(config), rngs=nnx.Rngs(0))
x = jnp.ones((2, 16, 32))
layer.lazy_init(x)
assert layer(x).shape == x.shape
print(jax.tree.map(jnp.shape, nnx.state(layer)))

# %% [markdown]
# ## A rule of your own
#
# Key/value heads whose queries vary most get most query heads. A name is all that it needs.


# %%
@dataclasses.dataclass(frozen=True)
class QueryVariance(rules.Rule):
    """By the variance of the queries of now."""

    sharpness: float = options.option(1.0)

    def scores(self, query, key, memory, mask):
        variance = jnp.var(jax.lax.stop_gradient(query), axis=1).sum(-1)  # BN
        return variance.reshape(key.shape[0], key.shape[2], -1).mean((0, 2))  # K

    def allocate(self, scores, memory, num_heads):
        return allocation.apportion(scores**self.sharpness, num_heads)


attention.register("query_variance", QueryVariance)
config = attention.configure("query_variance", num_heads=8, num_kv_heads=4, sharpness=3.0)
model = Classifier(config)
variables = jax.jit(model.init)(jax.random.key(1), images[:1])
_, seen = model.apply(variables, images[:32], mutable=["grouping"])
print("query heads per key/value head:", seen["grouping"]["attention_0"]["allocation"])
assert seen["grouping"]["attention_0"]["allocation"].sum() == 8
