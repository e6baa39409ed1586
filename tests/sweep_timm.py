"""Every ViT of timm, small, through `convert.load`: equal logits, or refused by the feature's name.

    python tests/sweep_timm.py [--names vit_base_patch16_224 ...] [--every 6]
    python tests/sweep_timm.py --table docs/checkpoints.md
    python tests/sweep_timm.py --goldens tests/goldens/timm_architectures.json

The second form also writes the table of that page. The third writes what timm says of `SPREAD`, for
tests where there is no timm: config.json, names and shapes, and logits; the weights follow from
names and shapes (`weights`).

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
import json
import pathlib
import sys
import tempfile
from unittest import mock

import helpers
import numpy as np

from kdgqa_jax import convert
from kdgqa_jax.convert.sources import timm_architectures
from kdgqa_jax.errors import UserError

SPREAD = (
    "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224",
    "flexivit_small", "eva_large_patch14_196", "vit_base_patch16_224_miil",
    "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_giant_patch14_dinov2",
    "vit_giant_patch14_reg1_tipsv2", "vit_xsmall_patch16_clip_224",
    "vit_base_patch16_clip_quickgelu_224", "vit_base_patch16_plus_clip_240",
    "vit_base_patch16_siglip_224", "vit_base_patch32_siglip_256",
    "vit_so400m_patch14_siglip_gap_224", "vit_base_patch16_gap_224", "vit_medium_patch16_gap_240",
    "vit_wee_patch16_reg1_gap_256", "vit_pwee_patch16_reg1_gap_256",
    "vit_so150m_patch16_reg4_gap_256", "vit_so150m_patch16_reg4_map_256",
    "vit_base_patch16_rpn_224", "vit_base_patch16_xp_224", "vit_base_patch16_radio_v3",
    "vit_intern300m_patch14_448", "beit3_base_patch16_224", "aimv2_large_patch14_224",
    "test_vit3", "test_vit4",
)  # fmt: skip
"""One of each kind."""

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


def weights(shapes):
    """Random arrays by name, so large that attention matters; the same everywhere."""
    arrays = {}
    for seed, (name, shape) in enumerate(sorted(shapes.items())):
        noise = helpers.normal(seed, *shape)
        if name.split(".")[-1] in ("cls_token", "reg_token", "dist_token", "pos_embed", "latent"):
            arrays[name] = noise
        elif len(shape) > 1:
            arrays[name] = (noise * 1.5 / np.prod(shape[1:]) ** 0.5).astype(np.float32)
        else:
            arrays[name] = (name.endswith(("weight", "gamma")) + 0.3 * noise).astype(np.float32)
    return arrays


def images_of(side):
    """NHWC float32."""
    return helpers.normal(1000, BATCH, side, side, 3)


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
    model = timm.create_model(
        name, depth=DEPTH, embed_dim=width, img_size=GRID * patch, mlp_ratio=ratio, num_classes=7
    ).eval()
    arrays = weights({name: tuple(x.shape) for name, x in model.state_dict().items()})
    model.load_state_dict({name: torch.from_numpy(x) for name, x in arrays.items()})
    return model, full


def logits_of(model, nhwc):
    """Of a model of timm, (images, classes)."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(nhwc.transpose(0, 3, 1, 2).copy())).numpy()


def compared(place, nhwc, expected):
    """(outcome, what there is to say) of loading what is at a place."""
    try:
        converted = convert.load(place)
    except UserError as error:
        return "refused", str(error).removeprefix(f"{place}/")
    found = helpers.apply(converted.model, converted.variables, nhwc)
    error = np.abs(found - expected).max() / max(np.abs(expected).max(), 1)
    if found.shape != expected.shape or not error <= 1e-4:
        return "wrong", f"logits differ by {error:.1e}"
    return "equal", f"{error:.1e}"


def try_one(timm, name, folder):
    """(outcome, what there is to say): "equal", "refused", "wrong" or "fault"."""
    from timm.models import save_for_hf

    model, full = small(timm, name)
    save_for_hf(model, folder, safe_serialization=True)
    nhwc = images_of(GRID * full.get("patch_size", 16))
    outcome, said = compared(folder, nhwc, logits_of(model, nhwc))
    if outcome == "equal":
        table = timm_architectures.arguments(name, "")
        stated = tuple(table.get(n) for n in ("embed_dim", "num_heads"))
        if stated != (full["embed_dim"], full["num_heads"]):
            return "wrong", f"width and heads {stated} in our table"
    return outcome, said


def golden(timm, name):
    """What a test needs of an architecture."""
    from timm.models import save_for_hf

    model, full = small(timm, name)
    side = GRID * full.get("patch_size", 16)
    with tempfile.TemporaryDirectory() as folder:
        save_for_hf(model, folder)
        config = json.loads((pathlib.Path(folder) / "config.json").read_text())
    logits = np.float64(logits_of(model, images_of(side))).round(6).tolist()
    shapes = {name: list(x.shape) for name, x in model.state_dict().items()}
    return {"config": config, "shapes": shapes, "side": side, "logits": logits}


def sweep(timm, names):
    """Yields (name, outcome, what there is to say)."""
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcome = try_one(timm, name, pathlib.Path(folder))
            except Exception as error:
                outcome = "fault", f"{type(error).__name__}: {error}"
        yield name, *outcome


MARKS = ("<!-- python tests/sweep_timm.py --table docs/checkpoints.md -->", "<!-- end -->")
_SIZES = ("embed_dim", "num_heads", "reg_tokens", "init_values")


def features(name):
    """What an architecture has beside a plain ViT, by timm's arguments."""
    try:
        found = timm_architectures.arguments(name, name)
    except UserError as error:
        return str(error).split(" has ")[-1].split(",")[0]
    more = [f"{key}={value}" for key, value in found.items() if key not in _SIZES]
    more += [key for key in ("reg_tokens", "init_values") if key in found]
    return ", ".join(sorted(more)) or "a plain ViT"


def table(results):
    """Markdown: a row for each kind of architecture, whether it loads, and who is of it."""
    kinds = {}
    for name, outcome, _ in results:
        kinds.setdefault((features(name), outcome), []).append(name)
    rows = ["| what it has beside a plain ViT | | | architectures |", "|---|---|---:|---|"]
    order = sorted(kinds.items(), key=lambda item: (item[0][1], -len(item[1]), item[0]))
    for (what, outcome), names in order:
        shown = ", ".join(f"`{name}`" for name in names)
        rows.append(f"| {what} | {outcome} | {len(names)} | {shown} |")
    return "\n".join(rows)


def write_table(path, results, summary):
    """Put the table between its marks in a page."""
    before, _, rest = path.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    body = f"{MARKS[0]}\n\n{summary}\n\n{table(results)}\n\n{MARKS[1]}"
    path.write_text(before + body + after)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", nargs="+")
    parser.add_argument("--every", type=int, default=1, help="take each n-th")
    parser.add_argument("--table", type=pathlib.Path, help="a page to put the table in")
    parser.add_argument("--goldens", type=pathlib.Path, help="a file to write")
    parser.add_argument("--refused", type=int, default=14, help="so many may be refused")
    arguments = parser.parse_args()
    timm = import_timm()
    if timm is None:
        raise SystemExit("timm is not installed: pip install --no-deps timm==1.0.31")
    if arguments.goldens:
        found = {name: golden(timm, name) for name in SPREAD}
        lines = (f"{json.dumps(name)}: {json.dumps(x)}" for name, x in found.items())
        arguments.goldens.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        return
    names = arguments.names or entry_points(timm)[:: arguments.every]
    tally = dict.fromkeys(("equal", "refused", "wrong", "fault"), 0)
    results = []
    for result in sweep(timm, names):
        name, outcome, said = result
        results.append(result)
        tally[outcome] += 1
        if outcome != "equal":
            print(f"{outcome}: {name}: {said}", flush=True)
    counts = ", ".join(f"{count} {outcome}" for outcome, count in tally.items())
    summary = f"{len(names)} architectures of timm {timm.__version__}: {counts}."
    print(summary)
    if arguments.table:
        write_table(arguments.table, results, summary)
    bad = tally["wrong"] + tally["fault"]
    raise SystemExit(1 if bad or tally["refused"] > arguments.refused else 0)


if __name__ == "__main__":
    main()
