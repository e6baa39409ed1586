"""Tiny checkpoints of every layout and format, with what a reader has to find in them.

Layouts and formats are written here by their definitions, not by the package.
"""

import collections
import json
import shutil

import ml_dtypes
import numpy as np
import torch

from kdgqa_jax import checkpoint, convert

SOUND, REFUSED, EITHER = "sound", "refused", "either"
"""What is to come out: the numbers that were drawn, a refusal, or one of the two."""

D, N, M, P = 8, 2, 12, 4  # width, query heads, MLP width, patch


# --- models and their layouts -------------------------------------------------------------------


class Model:
    """Random weights by our names, and what a reader has to find out about them."""

    def __init__(self, rng):
        self.rng = rng
        self.classes = int(rng.choice([0, 1, rng.integers(2, 2000)]))
        self.depth = int(rng.integers(1, 3))
        self.channels = int(rng.choice([1, 3]))
        self.kv = int(rng.choice([1, N]))
        self.grid = (2, 2)

    def weights(self):
        """{our path: array}, axes as in this package."""

        def draw(*shape):
            return self.rng.standard_normal(shape).astype(np.float32)

        found = {
            "cls_token": draw(1, 1, D),
            "pos_embed": draw(1, 1 + self.grid[0] * self.grid[1], D),
            "patch_embed/kernel": draw(P, P, self.channels, D),
            "patch_embed/bias": draw(D),
            "norm/scale": draw(D),
            "norm/bias": draw(D),
        }
        if self.classes:
            found |= {"head/kernel": draw(D, self.classes), "head/bias": draw(self.classes)}
        for i in range(self.depth):
            block = f"blocks_{i}"
            for norm in ("norm1", "norm2"):
                found |= {f"{block}/{norm}/scale": draw(D), f"{block}/{norm}/bias": draw(D)}
            for name, heads in (("query", N), ("key", self.kv), ("value", self.kv)):
                found[f"{block}/attn/{name}/kernel"] = draw(D, heads, D // N)
                found[f"{block}/attn/{name}/bias"] = draw(heads, D // N)
            found |= {f"{block}/attn/out/kernel": draw(N, D // N, D)}
            found |= {f"{block}/attn/out/bias": draw(D)}
            for name, (rows, columns) in (("fc1", (D, M)), ("fc2", (M, D))):
                found[f"{block}/mlp/{name}/kernel"] = draw(rows, columns)
                found[f"{block}/mlp/{name}/bias"] = draw(columns)
        return found


def pytorch(weights, names, fused=False):
    """A state dict: `names` maps our modules, "{i}" for the number of a block, to theirs."""
    state, qkv = {}, collections.defaultdict(list)
    for path, x in weights.items():
        module, _, leaf = path.rpartition("/")
        number = module.split("/")[0].removeprefix("blocks_") if "blocks_" in module else ""
        general = module.replace(f"blocks_{number}", "blocks_{i}", 1) if number else module
        name = names[general or leaf].replace("{i}", number)
        if leaf == "kernel" and general == "patch_embed":
            x = x.transpose(3, 2, 0, 1)
        elif leaf == "kernel":
            x = x.reshape(-1, D).T if general.endswith("out") else x.reshape(len(x), -1).T
        elif leaf == "bias":
            x = x.reshape(-1)
        leaf = {"kernel": ".weight", "scale": ".weight", "bias": ".bias"}.get(leaf, "")
        if fused and general.rpartition("/")[2] in ("query", "key", "value"):
            qkv[f"blocks.{number}.attn.qkv{leaf}"].append(x)
        else:
            state[name + leaf] = np.ascontiguousarray(x)
    return state | {name: np.concatenate(parts) for name, parts in qkv.items()}


TIMM = {
    "cls_token": "cls_token", "pos_embed": "pos_embed", "patch_embed": "patch_embed.proj",
    "norm": "norm", "head": "head", "blocks_{i}/norm1": "blocks.{i}.norm1",
    "blocks_{i}/norm2": "blocks.{i}.norm2", "blocks_{i}/attn/query": "blocks.{i}.attn.q",
    "blocks_{i}/attn/key": "blocks.{i}.attn.k", "blocks_{i}/attn/value": "blocks.{i}.attn.v",
    "blocks_{i}/attn/out": "blocks.{i}.attn.proj", "blocks_{i}/mlp/fc1": "blocks.{i}.mlp.fc1",
    "blocks_{i}/mlp/fc2": "blocks.{i}.mlp.fc2",
}  # fmt: skip
HF_BLOCK = "vit.encoder.layer.{i}"
HF = {
    "cls_token": "vit.embeddings.cls_token", "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed": "vit.embeddings.patch_embeddings.projection", "norm": "vit.layernorm",
    "head": "classifier", "blocks_{i}/norm1": f"{HF_BLOCK}.layernorm_before",
    "blocks_{i}/norm2": f"{HF_BLOCK}.layernorm_after",
    **{f"blocks_{{i}}/attn/{x}": f"{HF_BLOCK}.attention.attention.{x}"
       for x in ("query", "key", "value")},
    "blocks_{i}/attn/out": f"{HF_BLOCK}.attention.output.dense",
    "blocks_{i}/mlp/fc1": f"{HF_BLOCK}.intermediate.dense",
    "blocks_{i}/mlp/fc2": f"{HF_BLOCK}.output.dense",
}  # fmt: skip


def augreg(weights):
    renamed = {}
    for path, x in weights.items():
        for ours, theirs in (
            ("cls_token", "cls"), ("pos_embed", "Transformer/posembed_input/pos_embedding"),
            ("patch_embed", "embedding"), ("attn", "MultiHeadDotProductAttention_1"),
            ("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2"), ("mlp/fc1", "MlpBlock_3/Dense_0"),
            ("mlp/fc2", "MlpBlock_3/Dense_1"), ("blocks_", "Transformer/encoderblock_"),
        ):  # fmt: skip
            path = path.replace(ours, theirs)
        renamed["Transformer/encoder_" + path if path.startswith("norm/") else path] = x
    return renamed


# --- formats ------------------------------------------------------------------------------------

CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int32": "I32",
         "int8": "I8", "bool": "BOOL", "uint8": "U8"}  # fmt: skip


def write_safetensors(path, arrays, metadata=None, pad=0, codes=None):
    """By the definition of the format; `codes` lies about dtypes, `pad` makes the header longer."""
    header, start = {"__metadata__": metadata} if metadata else {}, 0
    for name, x in arrays.items():
        header[name] = {
            "dtype": (codes or {}).get(name, CODES.get(x.dtype.name, "C64")),
            "shape": list(x.shape),
            "data_offsets": [start, start + x.nbytes],
        }
        start += x.nbytes
    text = json.dumps(header).encode() + b" " * pad
    data = b"".join(np.ascontiguousarray(x).tobytes() for x in arrays.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_torch(path, arrays, legacy=False, wrapper=None):
    def tensor(x):
        if x.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(x.astype(np.float32)).to(torch.bfloat16)
        return torch.from_numpy(np.array(x))

    tree = {name: tensor(x) for name, x in arrays.items()}
    tree = {wrapper: tree, "epoch": 3} if wrapper else tree
    torch.save(tree, path, _use_new_zipfile_serialization=not legacy)


def write_npz(path, arrays):
    np.savez(path.with_suffix(".npz"), **arrays)
    path.with_suffix(".npz").replace(path)


# --- cases --------------------------------------------------------------------------------------


FORMATS = {
    "timm": ("safetensors", "torch", "legacy", "npz"),
    "released": ("safetensors", "torch", "legacy"),
    "hf": ("safetensors", "torch"),
    "augreg": ("npz",),
    "export": ("safetensors",),
    "directory": ("safetensors",),
}
"""By kind of checkpoint."""


class Case:
    """A checkpoint to be written: arrays by their names, files beside them, and what to expect.

    Args:
      rng: draws everything.
      folder: an empty one.
      kind: of checkpoint, some of `FORMATS`; None: any.
      format: some of its formats; None: any.
      configured: with timm's config.json beside it; None: perhaps.
    """

    def __init__(self, rng, folder, kind=None, format=None, configured=None):
        fit = [
            (k, f)
            for k, formats in FORMATS.items()
            for f in formats
            if k in (kind or FORMATS) and f in (format or formats)
        ]
        self.kind, self.format = fit[rng.integers(len(fit))]
        self.configured = bool(rng.integers(2)) if configured is None else configured
        self.rng, self.model = rng, Model(rng)
        if self.kind in ("timm", "hf", "augreg"):
            self.model.kv = N
        self.weights = self.model.weights()
        self.path = folder / "source"
        self.file = self.path  # of the weights
        self.options, self.metadata, self.config, self.expect = {}, {}, {}, SOUND
        self.names = [f"class {i}" for i in range(self.model.classes)]
        getattr(self, f"_{self.kind}")(folder)

    def _timm(self, folder):
        self.arrays = pytorch(self.weights, TIMM, fused=True)
        self.options = {"num_heads": N}
        if self.configured:
            self.options = {}
            self._directory_of("model.safetensors" if self.format == "safetensors" else "a.bin")
            self.config = {
                "architecture": "vit_tiny_patch16_224", "num_classes": self.model.classes,
                "global_pool": "token", "label_names": self.names,
                "model_args": {"embed_dim": D, "num_heads": N, "patch_size": P,
                               "img_size": [P * n for n in self.model.grid],
                               "in_chans": self.model.channels, "depth": self.model.depth,
                               "act_layer": None},
                "pretrained_cfg": {"mean": [0.5] * self.model.channels, "crop_pct": 0.9,
                                   "std": [0.25] * self.model.channels, "crop_mode": "center",
                                   "input_size": [self.model.channels, 8, 8]},
            }  # fmt: skip

    def _released(self, folder):
        self.arrays = pytorch(self.weights, TIMM)
        self.options = {"num_heads": N, "attention": "gqa" if self.model.kv < N else "mha"}

    def _hf(self, folder):
        self.arrays = pytorch(self.weights, HF)
        hub = "model.safetensors" if self.format == "safetensors" else "pytorch_model.bin"
        self._directory_of(hub)
        self.config = {
            "model_type": "vit", "hidden_size": D, "num_hidden_layers": self.model.depth,
            "num_attention_heads": N, "intermediate_size": M, "hidden_act": "gelu",
            "layer_norm_eps": 1e-12, "image_size": 8, "patch_size": P, "qkv_bias": True,
            "num_channels": self.model.channels,
            "id2label": {str(i): name for i, name in enumerate(self.names)},
        }  # fmt: skip

    def _augreg(self, folder):
        self.arrays = augreg(self.weights)

    def _export(self, folder):
        self._directory(folder)
        exported = folder / "exported.safetensors"
        convert.export(self.path, exported)
        content = exported.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        self.metadata = header.pop("__metadata__")
        self.arrays = {
            name: np.frombuffer(content[8 + length :], np.float32, -1)[
                entry["data_offsets"][0] // 4 : entry["data_offsets"][1] // 4
            ].reshape(entry["shape"])
            for name, entry in header.items()
        }
        shutil.rmtree(self.path)
        exported.unlink()
        self.config, self.file = {}, self.path

    def _directory(self, folder):
        attention = "gqa" if self.model.kv < N else "mha"
        self.config = {
            "model": {"name": f"custom/{P}", "width": D, "depth": self.model.depth, "num_heads": N,
                      "mlp_width": M, "image_size": 8, "num_classes": self.model.classes,
                      "attention": attention, "num_kv_heads": self.model.kv,
                      "norm_epsilon": 1e-6},
            "channels": self.model.channels, "class_names": self.names,
            "preprocessing": {"mean": 0.5, "std": 0.25},
        }  # fmt: skip
        self.arrays = {f"params/{path}": x for path, x in self.weights.items()}
        self.file = self.path / checkpoint.WEIGHTS
        self.path.mkdir()
        self.write()

    def _directory_of(self, name):
        self.path.mkdir()
        self.file = self.path / name

    def write(self, **options):
        """Write the file of weights and, in a directory, the JSON file beside it."""
        if self.format == "safetensors":
            options.setdefault("metadata", self.metadata)
            write_safetensors(self.file, self.arrays, **options)
        elif self.format == "npz":
            write_npz(self.file, self.arrays)
        else:
            wrapper = self.rng.choice(["", "model", "state_dict"])
            write_torch(self.file, self.arrays, self.format == "legacy", str(wrapper))
        if self.config:
            name = "model.json" if "channels" in self.config else "config.json"
            (self.path / name).write_text(json.dumps(self.config))

    def wrong(self, converted):
        """What differs from what was drawn; "" if nothing does."""
        found = flattened(converted.variables["params"])
        expected = self.weights
        if found.keys() != expected.keys():
            return f"parameters {sorted(found.keys() ^ expected.keys())}"
        for path, x in expected.items():
            if not np.array_equal(np.asarray(found[path], np.float32), np.asarray(x, np.float32)):
                return path
        model = converted.model
        have = (model.attention.num_heads, model.attention.num_kv_heads, model.grid,
                model.pool, converted.description["channels"], model.num_classes)  # fmt: skip
        want = (N, self.model.kv, self.model.grid, "token", self.model.channels, self.model.classes)
        if have != want:
            return f"model {have} instead of {want}"
        epsilon = 1e-12 if self.kind == "hf" else 1e-6
        stated = self.expect == EITHER  # random values may state another one
        found = model.block.norm_epsilon
        return "" if stated or found == epsilon else f"epsilon {found}"


def flattened(tree, prefix=""):
    flat = {}
    for name, x in tree.items():
        flat |= flattened(x, f"{prefix}{name}/") if isinstance(x, dict) else {prefix + name: x}
    return flat
