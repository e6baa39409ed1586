"""The arrays of a file of another framework as parameters of ours."""

import dataclasses
import fnmatch
from collections.abc import Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from kdgqa_jax import allocation, model_json, vit
from kdgqa_jax.convert import files, inference, preprocessing
from kdgqa_jax.convert import structure as structures
from kdgqa_jax.convert.conversion_report import ConversionReport
from kdgqa_jax.convert.formats import first_line
from kdgqa_jax.convert.sources.layout import Bench, Layout
from kdgqa_jax.convert.sources.stated import Stated
from kdgqa_jax.errors import LARGEST, UserError, one_line, some

Flat = dict[str, Any]  # arrays by our names, such as "blocks_3/attn/query/kernel"


@dataclasses.dataclass
class Loaded:
    """A checkpoint as it was found, before anything is converted."""

    arguments: dict[str, Any]  # of vit.create; "attention" is None where the source leaves it open
    params: Flat
    norm_stats: Flat
    description: dict[str, Any]  # the rest of model.json
    report: ConversionReport
    resize: str = "timm"  # how its framework resizes position embeddings, of `resizing.RESIZING`
    seen_size: tuple[int, int] | None = None  # of images, where its framework resizes for them


@dataclasses.dataclass
class _File:
    """A file whose layout is known: its arrays by the names of the layout."""

    source: files.Source
    layout: Layout
    bench: Bench

    @property
    def arrays(self) -> files.Arrays:
        return self.bench.arrays

    def find(self, path: str) -> np.ndarray | None:
        """The array of one of our names, as it is in the file but for PyTorch's order of axes."""
        found = self.layout.theirs(path)
        whole = None if found is None else self.arrays.get(found[0])
        if whole is None or not self.layout.pytorch or whole.ndim < 2:
            return whole
        part = whole if found[1] is None else found[1].of(whole)
        return part.T if "/attn/" in path else self.layout.transform(path).read(part, 0)

    def refuse(self, problem: str) -> UserError:
        return UserError(f"{self.source.path}: {problem}")


def load_file(
    place: str,
    num_heads: int | None,
    seed: int,
    allow_missing: Sequence[str],
    allow_left_over: Sequence[str],
    arch: str | None = None,
) -> Loaded:
    """Read a file or directory of another framework; arguments and errors as `loading.load`."""
    loaded = from_source(files.read(place), num_heads, seed, allow_missing, allow_left_over, arch)
    loaded.report.source = place
    return loaded


def from_source(
    source: files.Source,
    num_heads: int | None = None,
    seed: int = 0,
    allow_missing: Sequence[str] = (),
    allow_left_over: Sequence[str] = (),
    arch: str | None = None,
) -> Loaded:
    """What a file that was read holds; arguments and errors as `loading.load`."""
    file = _File(source, *inference.recognise(source))
    names, layout = set(file.arrays), file.layout
    facts = inference.stated(source, layout, source.beside(layout.config_file), arch)
    depth = len(layout.block_numbers(names))
    caches = {  # the memory of DGQA
        path: found[0]
        for path in (f"blocks_{i}/attn/key_norm" for i in range(depth))
        if (found := layout.theirs(path)) and found[0] in names
    }
    structure = structures.structure_of(layout, file.arrays, facts, source.path)
    try:
        paths = structures.parameter_paths(depth, **structure)
    except UserError as error:  # options that do not go together
        raise UserError(f"{facts.place} describes no ViT ({error})") from None
    exact = _names(file, paths) == names - set(caches.values())
    if layout.only_plain and not facts.complete and not exact:
        # Not another architecture, but a plain ViT with something missing or left over.
        structure = structures.plain(structure)
        paths = structures.parameter_paths(depth, **structure)
    left_over = _check_names(file, paths, set(caches.values()), allow_missing, allow_left_over)
    _check_ambiguous(file, structure, facts)

    try:
        arguments, channels, notes = inference.arguments_of(
            source, layout, structure, facts, file.find, depth, num_heads
        )
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise file.refuse(f"no ViT has arrays of such shapes ({error})") from None
    arguments.setdefault("scan_layers", False)
    # Whatever the variant will be: its parameters are those of gqa, and mha is gqa with K == N.
    model = vit.create(**{**arguments, "attention": "gqa", "scan_layers": False})
    if source.metadata:
        arguments, model = _stated_model(file, facts.place, arguments, model)
    heads = model.attention.num_heads, model.attention.num_kv_heads

    report = ConversionReport(str(source.path))
    params = _parameters(file, model, paths, channels, seed, report)
    norm_stats = _norm_stats(file, caches, *heads, report)
    norm_stats |= _stated_norm_stats(file, model, report)
    report.left_over = left_over
    report.notes += notes
    report.notes.append(f"recognised as {layout.title}: {source.path.name}")
    attention, reason = inference.attention_of(source, *heads)
    arguments["attention"] = attention
    report.notes += [f"attention {attention}: {reason}"] if attention else []
    resize = layout.resize
    if model.reg_tokens and layout.resize_with_registers:
        resize = layout.resize_with_registers
    seen = preprocessing.size(source) if layout.any_size else None
    if seen not in (None, model.image_shape):
        report.notes.append(
            f"images of {seen[0]}x{seen[1]}, as preprocessor_config.json says; position embeddings"
            " are resized for them, as their framework does it"
        )
    else:
        seen = None
    description = {
        "channels": channels,
        "class_names": _class_names(source, model.num_classes),
        "preprocessing": preprocessing.describe(source, seen or model.image_shape),
    }
    return Loaded(arguments, params, norm_stats, description, report, resize, seen)


def _names(file: _File, paths: list[str]) -> set[str]:
    """What the layout calls those of our paths that it has a place for."""
    return {found[0] for path in paths if (found := file.layout.theirs(path))}


def _check_ambiguous(file: _File, structure: dict[str, Any], facts: Stated) -> None:
    """Raise UserError where the weights fit several models that compute different things."""
    layout = file.layout
    unknown = [name for name in layout.needs if name not in facts.values]
    more = structures.extras(structure) if layout.only_plain and not facts.complete else []
    if unknown or more:
        what = f"leave {', '.join(unknown)} open" if unknown else f"({', '.join(more)}) fit several"
        raise file.refuse(
            f"names of {layout.title} {what}, and nothing beside the weights says which"
            f" architecture it is; give --arch NAME (timm's, such as vit_base_patch16_clip_224), or"
            f" keep {layout.config_file} beside them"
        )


def _stated_model(
    file: _File, place: str, arguments: dict[str, Any], found: vit.VisionTransformer
) -> tuple[dict[str, Any], vit.VisionTransformer]:
    """The model that our metadata describes, compared with the one of the arrays.

    Raises UserError: it describes none, or another one.
    """
    options = model_json.current_options(dict(file.source.metadata.get("model", {})))
    if options and options.get("norm_pooled") is None:
        options.pop("norm_pooled", None)
        arguments = {name: x for name, x in arguments.items() if name != "norm_pooled"}
    if options.get("num_kv_heads") is None:
        options.pop("num_kv_heads", None)
    arguments = {**arguments, **options}
    try:
        model = vit.create(**{"attention": "gqa", **arguments}).clone(scan_layers=False)
        wrong = [
            f"{name}={there} there, {here} in the weights"
            for name, there, here in _differences(model, found)
        ]
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{place} does not describe a model ({one_line(error)})") from None
    if wrong:
        raise UserError(f"{place} does not fit the weights: {'; '.join(wrong)}; export it again")
    return arguments, model


_FROM_ARRAYS = (
    "width", "depth", "mlp_width", "patch_size", "grid", "num_classes", "pool", "class_token",
    "distillation", "representation_size", "num_heads", "num_kv_heads",
)  # fmt: skip
"""What arrays say of a model by their names and shapes."""


def _differences(
    there: vit.VisionTransformer, here: vit.VisionTransformer
) -> list[tuple[str, Any, Any]]:
    """(name, value there, value here) of what differs among `_FROM_ARRAYS`."""
    options = [{**vit.arguments(model), "grid": model.grid} for model in (there, here)]
    pairs = [(name, *(values[name] for values in options)) for name in _FROM_ARRAYS]
    return [pair for pair in pairs if pair[1] != pair[2]]


def _check_names(
    file: _File,
    paths: list[str],
    caches: set[str],
    allow_missing: Sequence[str],
    allow_left_over: Sequence[str],
) -> list[str]:
    """What is left over; raises UserError for whatever is missing, left over or not of floats."""
    layout = file.layout
    homeless = [path for path in paths if layout.theirs(path) is None]
    if homeless:
        raise file.refuse(f"the layout of {layout.title} has no place for {some(homeless)}")
    expected = {layout.theirs(path)[0] for path in paths}
    missing = sorted(expected - file.arrays.keys())
    left_over = sorted(file.arrays.keys() - expected - caches)
    left_over = [name for name in left_over if not layout.ignores(name)]
    no_floats = [
        f"{name} ({one_line(x.dtype, 40)})"
        for name, x in file.arrays.items()
        if name in expected | caches and x.dtype != np.float32
    ]

    def refused(names: list[str], allowed: Sequence[str]) -> list[str]:
        return [n for n in names if not any(fnmatch.fnmatchcase(n, p) for p in allowed)]

    problems = {
        "missing (--allow-missing NAME initialises it)": refused(missing, allow_missing),
        "left over (--allow-left-over NAME ignores it)": refused(left_over, allow_left_over),
        "not of floating point numbers (quantized? save them dequantized)": no_floats,
    }
    found = [f"{what}: {some(names)}" for what, names in problems.items() if names]
    if found:
        raise file.refuse(f"not complete in the layout of {file.layout.title}; {'; '.join(found)}")
    return left_over


def _parameters(
    file: _File,
    model: vit.VisionTransformer,
    paths: list[str],
    channels: int,
    seed: int,
    report: ConversionReport,
) -> Flat:
    """All parameters of `model`; raises UserError for whatever has another shape."""
    try:
        shapes = vit.variable_shapes(model, channels)["params"]
    except Exception as error:  # options that only building a model finds to be wrong
        raise file.refuse(f"no model can be built ({first_line(error)})") from None
    shapes = flax.traverse_util.flatten_dict(shapes, sep="/")
    pool_width = model.width // model.attention.num_heads
    head_width, v_head_width = model.head_widths
    widths = {"value": v_head_width, "out": v_head_width}
    params, missing, wrong = {}, [], []
    for path in paths:
        name, part = file.layout.theirs(path)
        if name not in file.arrays:
            missing.append(path)
            report.renew(path, "missing, as allowed: newly initialised")
            continue
        transform, array = file.layout.transform(path), file.arrays[name]
        like = np.broadcast_to(np.float32(0), shapes[path].shape)  # of no memory
        expected = transform.write(like).shape
        expected = expected if part is None else (part.count * expected[0], *expected[1:])
        if array.shape == expected:
            array = array if part is None else part.of(array)
            width = widths.get(path.split("/")[-2], head_width) if "/attn/" in path else pool_width
            params[path] = transform.read(array, width)
        else:
            wrong.append(f"{name} {array.shape} does not give {path} {shapes[path].shape}")
        origin, how = file.bench.origins.get(name, (name, ""))
        report.add(path, origin, how, "" if part is None else str(part), transform.how)
    if wrong:
        raise file.refuse(f"wrong shapes: {some(wrong)}")
    if missing:
        new = jax.device_get(vit.init_variables(model, jax.random.key(seed), channels)["params"])
        new = flax.traverse_util.flatten_dict(new, sep="/")
        params |= {path: new[path] for path in missing}
    return params


def _norm_stats(
    file: _File,
    caches: dict[str, str],
    num_heads: int,
    num_kv_heads: int,
    report: ConversionReport,
) -> Flat:
    """The caches of the released code as key norms, and the allocations that they stand for."""
    norm_stats: Flat = {}
    for path, name in caches.items():
        cache = file.arrays[name]
        if cache.shape != (num_kv_heads,):
            raise file.refuse(f"wrong shapes: {name} {cache.shape} instead of {(num_kv_heads,)}")
        frozen = path.replace("key_norm", "allocation")
        norm_stats[path] = cache
        norm_stats[frozen] = np.asarray(allocation.apportion(jnp.asarray(cache), num_heads))
        report.add(path, name)
        report.add(frozen, name, "apportioned")
    return norm_stats


def _stated_norm_stats(file: _File, model: vit.VisionTransformer, report: ConversionReport) -> Flat:
    """The memory as a file that we exported has it: allocations need not follow from the norms."""
    memory: Flat = {}
    num_heads, num_kv_heads = model.attention.num_heads, model.attention.num_kv_heads
    known = model.attention.initial_memory()
    parts = [file.source.metadata.get(name, {}) for name in ("allocation", "norm_stats")]
    for path, values in (parts[0] | parts[1]).items():  # older files hold allocations alone
        name = path.split("/")[-1]
        whole = name == "allocation"
        shape = known[name].shape if name in known else (num_kv_heads,)
        fits = _are_numbers(values, shape, whole)
        if not fits or (whole and (sum(values) != num_heads or min(values) < 0)):
            kind = "whole numbers" if whole else "numbers"
            raise file.refuse(
                f"metadata: norm_stats {one_line(path, 60)}={one_line(repr(values), 60)}; expected"
                f" {' x '.join(map(str, shape))} {kind}"
                f"{f' that add up to {num_heads}' if whole else ''}"
            )
        memory[path] = np.asarray(values, np.int32 if whole else np.float32)
        report.add(path, "metadata")
    return memory


def _are_numbers(values: Any, shape: tuple[int, ...], whole: bool) -> bool:
    """If JSON values are an array of a shape."""
    if shape:
        fits = isinstance(values, list) and len(values) == shape[0]
        return fits and all(_are_numbers(x, shape[1:], whole) for x in values)
    return (type(values) is int and abs(values) < LARGEST) or (type(values) is float and not whole)


def _class_names(source: files.Source, num_classes: int) -> list[str]:
    """From metadata or config.json (Hugging Face: id2label, timm: label_names), else numbers."""
    if source.metadata:
        names = source.metadata.get("class_names")
    else:
        config = {**(source.config.get("pretrained_cfg") or {}), **source.config}
        names = config.get("label_names", config.get("id2label"))
    if isinstance(names, dict):
        names = [names.get(str(i)) for i in range(num_classes)]
    if not isinstance(names, list) or len(names) != num_classes or None in names:
        names = range(num_classes)
    return [str(name) for name in names]
