"""What can be wrong with a checkpoint, or only look so. `MUTATIONS` is the table."""

import json
import pathlib
import zipfile

import numpy as np
import torch
from checkpoint_cases import EITHER, REFUSED, SOUND, D

_VALUES = (None, True, False, -1, 0, 1, 3, 2.5, 10**9, 10**30, 3000, float("nan"), float("inf"), "",
          "x", "kdgqa", [], [1], [3, 4, 5], [[1]], ["a"], {}, {"a": 1}, {"height": 8, "width": 8},
          "\n[red]", "a" * 3000)  # fmt: skip


MUTATIONS = {}


def mutation(expect, **only):
    """Register a mutation; `only` says for which cases, as `checkpoint_cases.Case` takes it."""

    def register(function):
        several = {name: (x,) if isinstance(x, str) else x for name, x in only.items()}
        MUTATIONS[function.__name__] = (expect, several, function)
        return function

    return register


def some_array(case, smallest=1):
    names = [name for name, x in case.arrays.items() if x.size >= smallest]
    return str(case.rng.choice(names))


def replaced(case, old, new, x):
    """The same order of arrays, one of them with another name."""
    case.arrays = {new if name == old else name: x if name == old else y
                   for name, y in case.arrays.items()}  # fmt: skip


@mutation(SOUND)
def nothing(case):
    case.write()


@mutation(SOUND, format="safetensors")
def longer_header(case):
    """Any low byte of the header's length, those of pickles and zip files among them."""
    case.write(pad=int(case.rng.integers(0, 256)))


@mutation(SOUND, format="safetensors")
def header_like_a_pickle_or_a_zip_file(case):
    case.write()
    length = int.from_bytes(case.file.read_bytes()[:8], "little")
    start = int(case.rng.choice([0x80, 0x0280, int.from_bytes(b"PK", "little")]))
    case.write(pad=(start - length) % (256 if start == 0x80 else 65536))


def cast(case, dtype):
    def changed(arrays):
        return {name: np.asarray(x, dtype) for name, x in arrays.items()}

    case.arrays, case.weights = changed(case.arrays), changed(case.weights)


@mutation(SOUND, kind=("timm", "released", "hf", "augreg"))
def other_floats(case):
    cast(case, case.rng.choice(["float16", "float64", "bfloat16"]))
    case.write()


@mutation(SOUND, kind=("timm", "released"))
def prefix_of_all(case):
    case.arrays = {f"module.{name}": x for name, x in case.arrays.items()}
    case.write()


@mutation(REFUSED, kind=("timm", "released", "hf"))
def one_parameter_twice(case):
    prefix = str(case.rng.choice(["vit.", "deit."])) if case.kind == "hf" else "module."
    name = some_array(case)
    bare = name.removeprefix("vit.")
    other = f"{prefix}{bare}" if f"{prefix}{bare}" not in case.arrays else bare
    if other == name:  # the class head of Hugging Face has no prefix
        other = prefix + name
    case.arrays[other] = case.arrays[name] + 1
    case.write()


@mutation(REFUSED)
def missing_array(case):
    del case.arrays[some_array(case)]
    case.write()


@mutation(REFUSED)
def left_over_array(case):
    words = [
        "ls1.gamma",
        "norm_pre.weight",
        "q_norm.weight",
        "extra",
        "\n",
        "reg_token",
        "a\u2028b",
    ]
    case.arrays[str(case.rng.choice(words))] = np.zeros(D, np.float32)
    case.write()


@mutation(REFUSED)
def misspelt_array(case):
    name = some_array(case)
    i = int(case.rng.integers(len(name)))
    replaced(case, name, name[:i] + "_~"[i % 2] + name[i + 1 :] + "x", case.arrays[name])
    case.write()


@mutation(REFUSED)
def other_shape(case):
    name = some_array(case)
    x = case.arrays[name]
    ways = [lambda: np.concatenate([x, x]), lambda: x[..., None], lambda: x[:0],
            lambda: np.repeat(x, 2, axis=-1), lambda: np.zeros(0, x.dtype)]  # fmt: skip
    case.arrays[name] = ways[case.rng.integers(len(ways))]()
    case.write()


@mutation(REFUSED)
def not_floats(case):
    name = some_array(case)
    dtype = case.rng.choice(["int8", "int32", "bool", "uint8", "complex64"])
    case.arrays[name] = case.arrays[name].astype(dtype)
    case.write()


@mutation(REFUSED)
def not_finite(case):
    name = some_array(case)
    x = case.arrays[name] = case.arrays[name].copy()
    x.flat[case.rng.integers(x.size)] = case.rng.choice([np.nan, np.inf, -np.inf])
    case.write()


@mutation(REFUSED, format="safetensors")
def lying_dtype(case):
    """Of as many bytes, or of a quantized kind that NumPy does not know."""
    name = some_array(case)
    codes = ["I32", "U32", "F8_E4M3", "F8_E5M2", "F4", "Q4", "BF16", "F64"]
    case.write(codes={name: str(case.rng.choice(codes))})


@mutation(REFUSED)
def cut_off(case):
    case.write()
    content = case.file.read_bytes()
    end = int(case.rng.integers(len(content)))
    case.file.write_bytes(content[: end if case.rng.random() < 0.5 else len(content) - 1 - end % 9])


@mutation(REFUSED, format="safetensors")
def bytes_behind(case):
    case.write()
    with case.file.open("ab") as file:
        file.write(bytes(int(case.rng.integers(1, 99))))


@mutation(REFUSED, format="safetensors")
def lying_length_of_the_header(case):
    case.write()
    content = case.file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    lies = [0, 1, length - 1, length + 1, len(content), 2**31, 2**63, 2**64 - 1, 100_000_000]
    lie = lies[case.rng.integers(len(lies))]
    case.file.write_bytes(lie.to_bytes(8, "little") + content[8:])


@mutation(EITHER, format="safetensors")
def random_bytes_in_the_header(case):
    case.write()
    content = bytearray(case.file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    for i in case.rng.integers(0, 8 + length, case.rng.integers(1, 4)):
        content[i] ^= 1 << int(case.rng.integers(8))
    case.file.write_bytes(bytes(content))


@mutation(EITHER, format="npz")
def random_bytes_of_a_zip_file(case):
    case.write()
    content = bytearray(case.file.read_bytes())
    for i in case.rng.integers(0, len(content), case.rng.integers(1, 20)):
        content[i] ^= 1 << int(case.rng.integers(8))
    case.file.write_bytes(bytes(content))


@mutation(EITHER, format="torch")
def random_bytes_in_the_pickle_of_a_zip_file(case):
    case.write()
    content = bytearray(case.file.read_bytes())
    with zipfile.ZipFile(case.file) as archive:
        record = next(r for r in archive.infolist() if r.filename.endswith("data.pkl"))
    for i in case.rng.integers(0, record.file_size, case.rng.integers(1, 4)):
        content[record.header_offset + 100 + i] ^= 1 << int(case.rng.integers(8))
    case.file.write_bytes(bytes(content))


@mutation(REFUSED, format="npz")
def member_twice(case):
    case.write()
    with zipfile.ZipFile(case.file) as archive:
        name = str(case.rng.choice(archive.namelist()))
        content = archive.read(name)
    with zipfile.ZipFile(case.file, "a") as archive:
        archive.writestr(name if case.rng.random() < 0.5 else name.removesuffix(".npy"), content)


@mutation(REFUSED, format="npz")
def bomb(case):
    case.write()
    size = int(case.rng.integers(80, 300))
    header = {"descr": "<f4", "fortran_order": False, "shape": (size * 2**18,)}
    with (
        zipfile.ZipFile(case.file, "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        for _ in range(size):
            file.write(bytes(2**20))


@mutation(REFUSED, format=("torch", "legacy"))
def expanded_tensor(case):
    name = some_array(case)
    state = {key: torch.from_numpy(np.array(x)) for key, x in case.arrays.items()}
    state[name] = torch.zeros(1).expand(int(case.rng.integers(2**26, 2**33)))
    if case.config:
        case.write()
    torch.save(state, case.file, _use_new_zipfile_serialization=case.format == "torch")


@mutation(REFUSED, format=("torch", "legacy"))
def special_tensor(case):
    name = some_array(case)
    x = torch.from_numpy(np.array(case.arrays[name])).reshape(-1)
    ways = [lambda: x.to_sparse(), lambda: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
            lambda: x.to(torch.float8_e5m2), lambda: x.to("meta"), lambda: x.to(torch.complex64),
            lambda: 3, lambda: [x], lambda: {"a": x}, lambda: None,
            lambda: pathlib.Path]  # fmt: skip
    state = {key: torch.from_numpy(np.array(x)) for key, x in case.arrays.items()}
    if case.config:
        case.write()
    torch.save({**state, name: ways[case.rng.integers(len(ways))]()}, case.file)


@mutation(REFUSED)
def gap_between_blocks(case):
    case.arrays = {
        name.replace("blocks.0.", "blocks.3000.").replace("layer.0.", "layer.3000.")
        .replace("encoderblock_0", "encoderblock_9000").replace("blocks_0", "blocks_9000"): x
        for name, x in case.arrays.items()
    }  # fmt: skip
    case.write()


def places(tree, path=()):
    """The paths of all values in nested dicts."""
    for key, value in tree.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


HONOURED = (  # stated: another model
    "num_attention_heads", "num_heads", "architecture", "hidden_act", "act_layer",
)  # fmt: skip


def planted(case, tree):
    """A random value at a random place of a JSON object."""
    spots = [spot for spot in places(tree) if spot[-1] not in HONOURED]
    spot = spots[case.rng.integers(len(spots))]
    for key in spot[:-1]:
        tree = tree[key]
    tree[spot[-1]] = _VALUES[case.rng.integers(len(_VALUES))]


@mutation(EITHER, kind=("hf", "directory", "timm"))
def any_value_in_the_json_file(case):
    if case.config:
        planted(case, case.config)
    case.write()


@mutation(REFUSED, kind=("hf", "directory"))
def a_json_file_that_is_none(case):
    case.write()
    texts = [
        "",
        "{",
        "[]",
        "3",
        "null",
        "[" * 100_000,
        '{"a": ' * 100_000,
        "\0",
        "\xff",
        '{"a":1}x',
    ]
    name = "model.json" if case.kind == "directory" else "config.json"
    text = texts[case.rng.integers(len(texts))]
    (case.path / name).write_text(text, encoding="latin-1")


@mutation(EITHER, kind="export")
def any_value_in_the_metadata(case):
    metadata = json.loads(case.metadata["kdgqa_jax"])
    planted(case, metadata)
    case.metadata["kdgqa_jax"] = json.dumps(metadata)
    case.write()


@mutation(REFUSED, kind=("export", "directory"))
def a_larger_model_is_described(case):
    """Refused at once, however large."""
    sizes = ("width", "depth", "mlp_width", "num_heads", "num_kv_heads", "num_classes")
    large = int(case.rng.choice([3000, 10**5, 10**9, 10**15]))
    name = str(case.rng.choice(sizes))
    if case.kind == "export":
        metadata = json.loads(case.metadata["kdgqa_jax"])
        metadata["model"][name] = large
        case.metadata["kdgqa_jax"] = json.dumps(metadata)
    else:
        case.config["model"][name] = large
    case.write()


@mutation(REFUSED, kind="timm", configured=True)
def another_computation_of_timm(case):
    arguments = {"global_pool": "avg", "act_layer": "mish", "qk_norm": True, "pre_norm": True,
                 "fc_norm": True, "norm_layer": "rmsnorm", "no_embed_class": True,
                 "reg_tokens": 4, "block_fn": "ParallelThingsBlock",
                 "final_norm": False, "init_values": 1e-5, "unknown_thing": 1}  # fmt: skip
    others = ["vit_base_patch16_rpn_224", "vit_base_patch32_clip_224", "vit_base_patch16_gap_224",
              "vit_small_patch14_dinov2", "flexivit_small", "deit3_base_patch16_224",
              "resnet50"]  # fmt: skip
    if case.rng.random() < 0.4:
        case.config["architecture"] = str(case.rng.choice(others))
    elif case.rng.random() < 0.3:
        case.config["global_pool"] = str(case.rng.choice(["avg", "max", "map", "avgmax"]))
    else:
        name = str(case.rng.choice(list(arguments)))
        case.config["model_args"][name] = arguments[name]
    case.write()
