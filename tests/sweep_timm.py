"""Every ViT of timm, small, through `convert.load`: equal logits, or refused by the feature's name.

    python tests/sweep_timm.py [--names vit_base_patch16_224 ...] [--every 6] [--table docs/FILE]

Every entry point of timm's `vision_transformer` and `deit` modules is built with two layers, heads
of width 8 and images of 4x4 patches, filled with random weights, and saved by timm itself
(`save_for_hf`): `config.json` and `model.safetensors`. `convert.load` reads that directory without
a flag; logits on three images are to agree within 1e-4, relative to the largest one, at least 1.
What timm says of an architecture at its full size (width, heads) is compared with our table.

timm must be installed (`pip install --no-deps timm==1.0.31`); of torchvision nothing is used, and
where it does not import, a stand-in takes its place. Exit status 1 if any model is silently wrong,
raises something else than a `UserError`, or more are refused than `--refused` (14) allows.
"""

import argparse
import contextlib
import importlib.machinery
import pathlib
import sys
import tempfile
from unittest import mock

import helpers
import numpy as np

from kdgqa_jax import convert
from kdgqa_jax.convert.sources import timm_architectures
from kdgqa_jax.errors import UserError

DEPTH, HEAD_WIDTH, GRID, BATCH = 2, 8, 4, 3


class _StandIn:
    """Finds torchvision and all below it, and gives mocks."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = mock.MagicMock()
        module.__name__, module.__path__, module.__spec__ = spec.name, [], spec
        return module

    def exec_module(self, module):
        pass


def import_timm():
    """timm, with a stand-in for torchvision where that does not import; None: no timm."""
    try:
        import torchvision  # noqa: F401
    except Exception:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.meta_path.insert(0, _StandIn())
    try:
        import timm

        return timm
    except ImportError:
        return None


def entry_points(timm):
    """The names of all architectures of the two modules."""
    return [n for m in ("vision_transformer", "deit") for n in timm.list_models(module=m)]


def registered(timm, name):
    """The arguments with which timm builds an architecture."""
    from timm.models import deit, vision_transformer

    seen = {}

    def record(variant, pretrained=False, **kwargs):
        seen.update(kwargs)
        raise KeyError  # there is nothing to be built

    with (
        mock.patch.object(vision_transformer, "_create_vision_transformer", record),
        mock.patch.object(deit, "_create_deit", record),
        contextlib.suppress(KeyError),
    ):
        timm.create_model(name)
    return seen


def small(timm, name):
    """(model, its arguments at full size): two layers, random weights that matter."""
    import torch

    full = registered(timm, name)
    patch = full.get("patch_size", 16)
    width = HEAD_WIDTH * full["num_heads"]
    # Hidden layers of the MLP are made even, as packed gates need it.
    ratio = 2 * max(round(full.get("mlp_ratio", 4) * width / 2), 1) / width
    if int(width * ratio) % 2:
        ratio += 0.5 / width
    torch.manual_seed(0)
    model = timm.create_model(
        name, depth=DEPTH, embed_dim=width, img_size=GRID * patch, mlp_ratio=ratio, num_classes=7
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else
                            1 + 0.3 * noise)  # fmt: skip
        for token in ("cls_token", "reg_token", "dist_token", "pos_embed"):
            if getattr(model, token, None) is not None:
                getattr(model, token).copy_(torch.randn_like(getattr(model, token)))
    return model, full


def try_one(timm, name, folder):
    """(outcome, what there is to say): "equal", "refused", "wrong" or "fault"."""
    import torch
    from timm.models import save_for_hf

    model, full = small(timm, name)
    save_for_hf(model, folder, safe_serialization=True)
    side = GRID * full.get("patch_size", 16)
    images = torch.randn(BATCH, 3, side, side)
    with torch.no_grad():
        expected = model(images).numpy()
    try:
        converted = convert.load(folder)
    except UserError as error:
        return "refused", str(error).removeprefix(f"{folder}/")
    table = timm_architectures.arguments(name, "")
    stated = tuple(table.get(n) for n in ("embed_dim", "num_heads"))
    if stated != (full["embed_dim"], full["num_heads"]):
        return "wrong", f"width and heads {stated} in our table"
    found = helpers.apply(
        converted.model, converted.variables, images.numpy().transpose(0, 2, 3, 1)
    )
    error = np.abs(found - expected).max() / max(np.abs(expected).max(), 1)
    if found.shape != expected.shape or not error <= 1e-4:
        return "wrong", f"logits differ by {error:.1e}"
    return "equal", f"{error:.1e}"


def sweep(timm, names):
    """Yields (name, outcome, what there is to say)."""
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcome = try_one(timm, name, pathlib.Path(folder))
            except Exception as error:
                outcome = "fault", f"{type(error).__name__}: {error}"
        yield name, *outcome


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", nargs="+")
    parser.add_argument("--every", type=int, default=1, help="take each n-th")
    parser.add_argument("--refused", type=int, default=14, help="so many may be refused")
    arguments = parser.parse_args()
    timm = import_timm()
    if timm is None:
        raise SystemExit("timm is not installed: pip install --no-deps timm==1.0.31")
    names = arguments.names or entry_points(timm)[:: arguments.every]
    tally = dict.fromkeys(("equal", "refused", "wrong", "fault"), 0)
    for name, outcome, said in sweep(timm, names):
        tally[outcome] += 1
        if outcome != "equal":
            print(f"{outcome}: {name}: {said}", flush=True)
    print(f"{len(names)} architectures of timm {timm.__version__}: {tally}")
    bad = tally["wrong"] + tally["fault"]
    raise SystemExit(1 if bad or tally["refused"] > arguments.refused else 0)


if __name__ == "__main__":
    main()
