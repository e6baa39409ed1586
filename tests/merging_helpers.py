"""Attention layers, tokens and naive references for the tests of merging.

References are loops over heads and images in float64 that share no code with the package.
"""

import helpers
import jax
import numpy as np
from helpers import D, H, N

from kdgqa_jax import convert

RULES = list(convert.MERGING)


def random_layer(seed=0, kv_heads=N, scale=0.2):
    """An attention layer with biases; key and value heads differ in size."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return scale * rng.standard_normal(shape)

    attention = {
        "query": {"kernel": draw(D, N, H), "bias": draw(N, H)},
        "key": {"kernel": draw(D, kv_heads, H), "bias": draw(kv_heads, H)},
        "value": {"kernel": draw(D, kv_heads, H), "bias": draw(kv_heads, H)},
        "out": {"kernel": draw(N, H, D), "bias": draw(D)},
    }
    for name in ("key", "value"):
        attention[name]["kernel"] *= np.exp(0.5 * rng.standard_normal((kv_heads, 1)))
    return attention


def of_low_rank(attention, num_kv_heads, seed=1):
    """The same with key and value kernels of joint rank H in each group; biases are not in it."""
    rng = np.random.default_rng(seed)
    for name in ("key", "value"):
        kernel = attention[name]["kernel"]
        group = kernel.shape[1] // num_kv_heads
        for k in range(num_kv_heads):
            basis = 0.2 * rng.standard_normal((D, H))
            for j in range(k * group, (k + 1) * group):
                kernel[:, j] = basis @ rng.standard_normal((H, H))
    return attention


def as_float32(attention):
    return jax.tree.map(np.float32, attention)


def structured_tokens(seed=0, images=40, length=10, with_class_token=True):
    """(images, length, D) whose directions differ in size, with a mean and a class token."""
    rng = np.random.default_rng(seed)
    spread = np.exp(-np.arange(D) / 12.0)
    turn = np.linalg.qr(np.random.default_rng(99).standard_normal((D, D)))[0]
    x = rng.standard_normal((images, length, D)) * spread @ turn + 0.3 * turn[3]
    x += 0.3 * rng.standard_normal((images, 1, D)) @ turn  # images differ
    if with_class_token:
        x[:, 0] = turn[5] + 0.05 * rng.standard_normal((images, D))
    return x


def naive_logits(x, attention):
    """BNTS with the mean of each row taken away: softmax does not see it."""
    q, k = (helpers.project(x, attention, name) for name in ("query", "key"))
    group = q.shape[2] // k.shape[2]
    logits = np.stack([q[:, :, n] @ k[:, :, n // group].swapaxes(1, 2) for n in range(N)], axis=1)
    return logits - logits.mean(-1, keepdims=True)


def naive_key_error(x, before, after):
    """Expected squared error of the logits per query head: every query with every centred key."""
    errors = []
    for n in range(N):
        products = []
        for attention in (before, after):
            k = helpers.project(x, attention, "key")
            k = k[:, :, n * k.shape[2] // N]
            k = np.concatenate([keys - keys.mean(0) for keys in k])
            q = helpers.project(x, attention, "query")[:, :, n].reshape(-1, k.shape[-1])
            products.append(q @ k.T)
        errors.append(np.mean((products[0] - products[1]) ** 2))
    return np.array(errors)


def naive_value_errors(x, before, after):
    """Error of what one token's value adds to the output, (N, tokens, D)."""
    errors = []
    for n in range(N):
        added = []
        for attention in (before, after):
            v = helpers.project(x, attention, "value")
            v = v[:, :, n * v.shape[2] // N].reshape(-1, v.shape[-1])
            added.append(v @ np.asarray(attention["out"]["kernel"], np.float64)[n])
        errors.append(added[0] - added[1])
    return np.array(errors)


def by_group(errors, num_kv_heads):
    return errors.reshape(num_kv_heads, -1).sum(axis=1)


def naive_mean_pooled(attention, num_kv_heads):
    pooled = dict(attention)
    for name in ("key", "value"):
        pooled[name] = {
            leaf: np.stack(np.split(x, num_kv_heads, axis=-2)).mean(-2).swapaxes(0, -2)
            if x.ndim == 3
            else np.stack([part.mean(0) for part in np.split(x, num_kv_heads)])
            for leaf, x in attention[name].items()
        }
    return pooled


def assert_same_function(x, before, after, relative=1e-5):
    """Logits, attention maps and outputs of the float32 layer, and the first two in float64."""
    before, after = as_float32(before), as_float32(after)
    helpers.assert_close(naive_logits(x, after), naive_logits(x, before), relative)
    results = []
    for attention in (before, after):
        module = helpers.layer("gqa", num_kv_heads=attention["key"]["kernel"].shape[1])
        run = helpers.fast_jit(lambda p, x, m=module: m.apply(p, x, mutable=["intermediates"]))
        out, sown = run({"params": attention}, np.float32(x))
        results.append((np.asarray(out), np.asarray(sown["intermediates"]["maps"])))
    for a, b in zip(*results, strict=True):
        helpers.assert_close(b, a, relative)
    assert np.ptp(results[0][1]) > 0.1  # attention is far from uniform
