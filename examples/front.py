"""Size of attention against accuracy: one pretrained ViT, every way to make its heads smaller.

    pip install elpv-dataset==1.0.0.post1     # 2,624 photographs of solar cells
    python examples/dinov2.py --out dinov2_small
    python examples/front.py --source dinov2_small --images PHOTOGRAPHS --out front

A row is one conversion, without any training: fewer key/value heads (pooled or merged), narrower
heads, both, widths that differ by layer. Its features (what the pool gives, without a head) are
compared with those of the original on images that no conversion saw: R2 (1 - squared error /
variance) and mean cosine. Rows of the table are judged by --count images; further ones, which are
there for the rank correlation of what `kdgqa convert` predicts, by --few of them.

front.json holds everything; front.md, front.png, front.svg and gate.png are made from it. Rows that
it holds already are kept: a run that was stopped resumes. All models are judged in the shapes of
the source, heads repeated and filled up with zeros, which computes the same in one compiled
program.
"""

import argparse
import dataclasses
import pathlib
import time
from typing import Any

import jax
import numpy as np

from kdgqa_jax import convert, tree_utils, vit, workdir
from kdgqa_jax.convert import CalibrationImages
from kdgqa_jax.data.images import Preprocessing
from kdgqa_jax.heads.forecast import discarded
from kdgqa_jax.heads.merging_problem import moments_seen, problems_of
from kdgqa_jax.heads.moments import data_free_by_layer
from kdgqa_jax.version import versions

# --- which conversions --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A row; widths of "by layer" are those of the same size for all layers."""

    rule: str
    kv_heads: int
    head_width: int
    v_head_width: int
    calibrated: bool = False
    refit: bool = False
    in_table: bool = False

    @property
    def name(self) -> str:
        """Such as "svd, 3 KV heads of 48, calibrated"."""
        width = f"{self.head_width}"
        if self.v_head_width != self.head_width:
            width += f"/{self.v_head_width}"
        how = ["calibrated"] * self.calibrated + ["refitted"] * self.refit
        return ", ".join([self.rule, f"{self.kv_heads} KV heads of {width}", *how])


def conversions(heads: int, width: int) -> list[Conversion]:
    """All rows of a model with so many heads of a width, each once.

    Projections are D (N H + K H + K V + N V) large: K heads of full width as large as N heads of
    width H (N + K) / 2 N.
    """
    fewer = [k for k in range(heads - 1, 0, -1) if heads % k == 0]
    sizes = [(heads + k) / (2 * heads) for k in fewer] + [0.5, 0.4]

    def narrowed(k: int, share: float) -> int:
        return int(min(width, 2 * heads * width * share // (heads + k)))

    rows = []
    for k in fewer:
        rows.append(Conversion("mean", k, width, width, in_table=True))
        rows += [Conversion("svd", k, width, width, by, in_table=by) for by in (False, True)]
    rows.append(Conversion("procrustes", fewer[0], width, width, True))
    rows += [Conversion(rule, k, width, width) for k in fewer for rule in ("first", "random")]
    for share in (0.95, 0.85, *sizes, 0.3):
        w, shown = narrowed(heads, share), share in sizes[:-1]
        rows += [
            Conversion("width", heads, w, w, by, in_table=by and shown) for by in (False, True)
        ]
    for k in fewer[:2]:
        for share in (s for s in sizes if s < (heads + k) / (2 * heads)):
            w, shown = narrowed(k, share), share >= 0.5 and (k == fewer[0] or share == 0.5)
            rows += [Conversion("svd", k, w, w, by, in_table=by and shown) for by in (False, True)]
    more, half = width // 8, width // 2
    for share in sizes[::2]:  # queries and keys of another width than values
        w = narrowed(heads, share)
        rows += [Conversion("width", heads, w - d, w + d, True) for d in (more, -more)]
    rows += [Conversion("width", heads, h, v, True) for h, v in ((half, width), (width, half))]
    for share in sizes[:4]:
        w = narrowed(heads, share)
        rows.append(Conversion("by layer", heads, w, w, True, in_table=True))
    refitted = [("mean", fewer[0], 1.0), ("svd", fewer[-1], 1.0), ("width", heads, sizes[-3])]
    for rule, k, share in refitted:
        w = narrowed(k, share)
        rows.append(Conversion(rule, k, w, w, True, True, in_table=True))
    once: dict[str, Conversion] = {}
    for row in rows:  # small heads are cut to the same width for several sizes
        if row.name not in once or row.in_table:
            once[row.name] = row
    return list(once.values())


# --- one conversion -----------------------------------------------------------------------------


@dataclasses.dataclass
class Source:
    """The pretrained model, images to convert by, and the moments of its layers."""

    model: vit.VisionTransformer
    params: dict[str, Any]  # layers unrolled
    images: np.ndarray
    moments: dict[str, Any]

    def convert(self, row: Conversion) -> dict[str, Any]:
        """Parameters after a conversion, layers unrolled."""
        if row.rule == "by layer":
            return self._by_layer(row)
        multi_head = row.kv_heads == self.model.attention.num_heads
        arguments = {
            **vit.arguments(self.model),
            "attention": "mha" if multi_head else "gqa",
            "num_kv_heads": row.kv_heads,
            "head_width": row.head_width,
            "v_head_width": row.v_head_width,
        }
        grouped = convert.group_heads(
            self.model,
            {"params": self.params},
            vit.create("custom", **arguments),
            row.rule,
            images=self.images if row.calibrated else None,
            moments=self.moments if row.calibrated else None,
            refit=row.refit,
        )
        return jax.device_get(grouped.params)

    def _by_layer(self, row: Conversion) -> dict[str, Any]:
        """Narrow heads, the same number of dimensions in all, shared out over layers and sides.

        A dimension goes where it holds most of the energy of the layer's logits, or values.
        """
        spectra = {}
        for name, moments in self.moments.items():
            layer, scale = self.params[name]["attn"], self.params[name].get("ls1")
            layer = jax.tree.map(np.float64, layer)
            problems = problems_of(layer, moments, moments_seen(layer, moments), scale)
            for side, problem in problems.items():
                energies = problem.spectrum(row.kv_heads).sum(axis=0)
                spectra[name, side] = energies / energies.sum()
        gains = sorted(((x, key) for key, of in spectra.items() for x in of), reverse=True)
        budget = row.head_width * len(spectra)
        chosen = [key for _, key in gains[:budget]]
        params = dict(self.params)
        for name, moments in self.moments.items():
            widths = (max(chosen.count((name, side)), 1) for side in ("key", "value"))
            head_width, v_head_width = widths
            old = self.params[name]
            layer = convert.merge_heads(
                old["attn"], row.kv_heads, moments, layer_scale=old.get("ls1"),
                head_width=head_width, v_head_width=v_head_width,
            )  # fmt: skip
            params[name] = {**old, "attn": jax.tree.map(np.float32, layer.attention)}
        return params


def in_shapes_of(params: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """The same function with as many and as wide heads as another model of that architecture."""
    params = dict(params)
    for name in (name for name in params if name.startswith("blocks_")):
        layer, wide = params[name]["attn"], like[name]["attn"]
        shapes = {part: wide[part]["kernel"].shape for part in ("query", "key", "value", "out")}
        # Logits are divided by the root of the width.
        factor = (shapes["key"][2] / layer["key"]["kernel"].shape[2]) ** 0.25
        filled = {}
        for part in ("query", "key", "value"):
            repeats = shapes[part][1] // layer[part]["kernel"].shape[1]
            filled[part] = {}
            for leaf, x in layer[part].items():
                x = np.repeat(x, repeats, axis=-2) * np.float32(1 if part == "value" else factor)
                padding = [(0, 0)] * (x.ndim - 1) + [(0, shapes[part][2] - x.shape[-1])]
                filled[part][leaf] = np.pad(x, padding)
        kernel = layer["out"]["kernel"]
        missing = shapes["out"][1] - kernel.shape[1]
        filled["out"] = {**layer["out"], "kernel": np.pad(kernel, [(0, 0), (0, missing), (0, 0)])}
        params[name] = {**params[name], "attn": {**layer, **filled}}
    return params


class Judge:
    """Features of the original on held-out images, and how near those of others come."""

    def __init__(self, source: Source, images: np.ndarray, batch_size: int = 16):
        model = source.model.clone(scan_layers=None)
        self._run = jax.jit(lambda p, x: vit.apply_in_evaluation(model, {"params": p}, x)[0])
        self._like, self._images, self._batch = source.params, images, batch_size
        self._features = self._of(source.params, len(images))

    def _of(self, params: dict[str, Any], count: int) -> np.ndarray:
        parts = range(0, count, self._batch)
        found = [self._run(params, self._images[i : i + self._batch]) for i in parts]
        return np.concatenate([np.asarray(x, np.float64) for x in found])[:count]

    def scores(self, params: dict[str, Any], count: int, few: int) -> dict[str, float]:
        """R2 and mean cosine of the first `count` images, and the cosine of the first `few`."""
        found, true = self._of(in_shapes_of(params, self._like), count), self._features[:count]
        lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(true, axis=1)
        cosines = np.sum(found * true, axis=1) / lengths
        spread = np.sum((true - true.mean(axis=0)) ** 2)
        return {
            "r2": float(1.0 - np.sum((found - true) ** 2) / spread),
            "cosine": float(cosines.mean()),
            "cosine_of_few": float(cosines[:few].mean()),
        }


def attention_size(params: dict[str, Any]) -> int:
    """Parameters of the four projections of all layers."""
    blocks = (params[name]["attn"] for name in params if name.startswith("blocks_"))
    parts = ("query", "key", "value", "out")
    return sum(x.size for block in blocks for part in parts for x in block[part].values())


def measure(source: Source, judge: Judge, row: Conversion, count: int, few: int) -> dict[str, Any]:
    """A row of front.json."""
    started = time.monotonic()
    params = source.convert(row)
    free = data_free_by_layer(source.params)
    shares = {
        how: [
            discarded(source.params[n]["attn"], params[n]["attn"], m, source.params[n].get("ls1"))
            for n, m in moments.items()
        ]
        for how, moments in (("calibrated", source.moments), ("without data", free))
    }
    count = count if row.in_table else few
    return {
        **dataclasses.asdict(row),
        "name": row.name,
        "parameters": attention_size(params),
        "share_of_parameters": attention_size(params) / attention_size(source.params),
        "images": count,
        **judge.scores(params, count, few),
        "discarded": {how: float(np.mean(by_layer)) for how, by_layer in shares.items()},
        "discarded_by_layer": shares,
        "seconds": round(time.monotonic() - started, 1),
    }


# --- the gate -----------------------------------------------------------------------------------


def gate(rows: list[dict[str, Any]], size: int = 6) -> dict[str, Any]:
    """Rank correlations of the share discarded with the cosine kept, and bands of it.

    Each row by the share that `kdgqa convert` prints for it: by the moments of images where it was
    calibrated. A band is (share up to, conversions, least and largest cosine), `size` rows or more.
    """
    from scipy.stats import spearmanr

    found: dict[str, Any] = {}
    rows = [row for row in rows if not row["refit"]]
    printed = []
    for how, calibrated in (("calibrated", True), ("without data", False)):
        pairs = sorted(
            (row["discarded"][how], row["cosine_of_few"])
            for row in rows
            if row["calibrated"] == calibrated
        )
        printed += pairs
        parts = np.array_split(np.array(pairs), max(len(pairs) // size, 1))
        bands = [(x[-1, 0], len(x), x[:, 1].min(), x[:, 1].max()) for x in parts]
        correlation = spearmanr(*zip(*pairs, strict=True)).statistic
        found[how] = {"conversions": len(pairs), "rank correlation": correlation, "bands": bands}
    found["as printed"] = {
        "conversions": len(printed),
        "rank correlation": spearmanr(*zip(*printed, strict=True)).statistic,
    }
    return found


# --- table and plots ----------------------------------------------------------------------------

FAMILIES = {
    "mean pooling": lambda row: row["rule"] == "mean" and not row["refit"],
    "fewer heads (svd)": lambda row: row["rule"] == "svd" and row["full_width"],
    "narrower heads (width)": lambda row: row["rule"] == "width" and not row["refit"],
    "fewer and narrower (svd)": lambda row: row["rule"] == "svd" and not row["full_width"],
    "narrower by layer": lambda row: row["rule"] == "by layer",
}


def families(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows of the table by family, the largest first; refitted ones apart."""
    rows = [
        {**row, "full_width": row["head_width"] == result["head_width"]}
        for row in result["rows"]
        if row["in_table"]
    ]
    plain = [row for row in rows if not row["refit"]]
    found = {name: [row for row in plain if belongs(row)] for name, belongs in FAMILIES.items()}
    found["refitted"] = [row for row in rows if row["refit"]]
    return {k: sorted(v, key=lambda row: -row["parameters"]) for k, v in found.items() if v}


def as_markdown(result: dict[str, Any], title: str) -> str:
    """The table, and the gate's figures."""
    flags = [f"--{k.replace('_', '-')} {v}" for k, v in result["command"].items() if v]
    command = " ".join(["python examples/front.py", *flags])
    lines = [f"# {title}", "", f"`{command}`, {result['date']}.", ""]
    lines += ["| | conversion | attention parameters | R2 | cosine |", "|---|---|---:|---:|---:|"]
    for family, rows in families(result).items():
        for row in rows:
            size = f"{row['parameters']:,} ({row['share_of_parameters']:.0%})"
            figures = f"{row['r2']:.3f} | {row['cosine']:.3f}"
            lines.append(f"| {family} | {row['name']} | {size} | {figures} |")
    lines += ["", "| moments | conversions | rank correlation |", "|---|---:|---:|"]
    for how, found in result["gate"].items():
        lines.append(f"| {how} | {found['conversions']} | {found['rank correlation']:.2f} |")
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any], out: pathlib.Path) -> None:
    """front.png, front.svg and gate.png."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for family, rows in families(result).items():
        x = [100 * row["share_of_parameters"] for row in rows]
        line = {"linestyle": "none"} if family == "refitted" else {}
        axes.plot(x, [row["cosine"] for row in rows], marker="o", label=family, **line)
    axes.set(xlabel="attention parameters, % of the original", ylabel="cosine of features")
    axes.legend()
    for ending in ("png", "svg"):
        with workdir.written_file(out / f"front.{ending}") as path:
            figure.savefig(path, format=ending, dpi=150)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for how, calibrated in (("calibrated", True), ("without data", False)):
        rows = [r for r in result["rows"] if not r["refit"] and r["calibrated"] == calibrated]
        shares = [row["discarded"][how] for row in rows]
        axes.plot(shares, [row["cosine_of_few"] for row in rows], "o", label=how)
    axes.set(xscale="log", xlabel="share discarded, mean of layers", ylabel="cosine of features")
    axes.legend()
    with workdir.written_file(out / "gate.png") as path:
        figure.savefig(path, format="png", dpi=150)


# --- the command --------------------------------------------------------------------------------


def main() -> None:
    """Measure what is missing, write everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True, help="a checkpoint that kdgqa convert reads")
    parser.add_argument("--images", required=True, help="a folder of image files, or a data set")
    parser.add_argument("--data-dir", default="", help="where the files of the data set are")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="directory to write")
    parser.add_argument("--image-size", type=int, default=112, help="side in pixels")
    parser.add_argument("--calibrate", type=int, default=160, help="images that calibrate")
    parser.add_argument(
        "--count", type=int, default=160, help="others, as many at most, that judge"
    )
    parser.add_argument("--few", type=int, default=32, help="of these: judge rows beside the table")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images")
    parser.add_argument("--also", type=pathlib.Path, nargs="*", default=[], help="other front.json")
    arguments = parser.parse_args()
    found = convert.load(arguments.source, image_size=arguments.image_size, num_classes=0)
    chosen = CalibrationImages(
        arguments.images, arguments.data_dir, 2 * arguments.calibrate, arguments.seed
    )
    preprocessing = Preprocessing(**found.description["preprocessing"])
    images = chosen.read(found.model.image_shape, found.description["channels"], preprocessing)
    params = tree_utils.unstack_layers(jax.device_get(found.variables["params"]))
    model = found.model.clone(scan_layers=False)
    moments = convert.gather_moments(model, {"params": params}, images[::2], batch_size=32)
    source = Source(model, params, images[::2], moments)
    judge = Judge(source, images[1::2][: arguments.count])

    arguments.out.mkdir(parents=True, exist_ok=True)
    place = arguments.out / "front.json"
    rows = workdir.read_json(place)["rows"] if place.exists() else []
    there = {row["name"] for row in rows}
    heads, width = found.model.attention.num_heads, found.model.head_widths[0]
    result = {
        "command": {name: str(value) for name, value in vars(arguments).items()},
        "head_width": width,
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }
    for row in conversions(heads, width):
        if row.name not in there:
            rows.append(measure(source, judge, row, arguments.count, arguments.few))
            print(row.name, {k: round(rows[-1][k], 4) for k in ("r2", "cosine")}, flush=True)
            workdir.write_json(place, {**result, "rows": rows})
    others = [row for path in arguments.also for row in workdir.read_json(path)["rows"]]
    result |= {"rows": rows, "gate": gate(rows), "gate_of_all": gate([*rows, *others], 10)}
    workdir.write_json(place, result)
    table = as_markdown(result, f"Size against accuracy: {arguments.out.name}")
    with workdir.written_file(arguments.out / "front.md") as path:
        path.write_text(table)
    draw(result, arguments.out)
    print(table)


if __name__ == "__main__":
    main()
