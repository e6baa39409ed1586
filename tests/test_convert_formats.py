"""The kind of a file follows from its contents, and no file costs much more than it holds."""

import io
import json
import zipfile

import helpers
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from kdgqa_jax import checkpoint, convert
from kdgqa_jax.convert import formats
from kdgqa_jax.errors import UserError


def header_length(content):
    return int.from_bytes(content[:8], "little")


def padded(arrays, low_byte, second=None):
    """A safetensors file whose header has a length that ends in these bytes."""
    names = {name: arrays[name] for name in sorted(arrays)}
    header, start = {"__metadata__": {"format": "pt"}}, 0
    for name, x in names.items():
        header[name] = {
            "dtype": "F32", "shape": list(x.shape), "data_offsets": [start, start + x.nbytes]
        }  # fmt: skip
        start += x.nbytes
    text = json.dumps(header).encode()
    while len(text) % 256 != low_byte or second not in (None, len(text) // 256 % 256):
        text += b" "
    data = b"".join(np.ascontiguousarray(x).tobytes() for x in names.values())
    return len(text).to_bytes(8, "little") + text + data


@pytest.fixture
def weights(golden):
    return helpers.golden_weights(golden("timm_vit"))


@pytest.mark.parametrize("start", [b"\x80", b"\x80\x02", b"PK", b"P", b"{"])
def test_any_length_of_the_header_is_that_of_a_safetensors_file(tmp_path, weights, start):
    """0x80 begins a pickle, PK a zip file."""
    path = tmp_path / "a.bin"
    path.write_bytes(padded(weights, *start))
    assert path.read_bytes().startswith(start)
    loaded = convert.load(path, num_heads=6).variables["params"]
    np.testing.assert_array_equal(
        loaded["blocks_1"]["mlp"]["fc1"]["kernel"], weights["blocks.1.mlp.fc1.weight"].T
    )


def test_exports_keep_their_metadata_whatever_their_first_byte_is(tmp_path):
    model = helpers.tiny_vit("gqa", num_classes=3)
    options = {"name": "mu/4", **helpers.TINY, "num_classes": 3, "attention": "kdgqa",
               "num_kv_heads": 3}  # fmt: skip
    first_bytes = set()
    for length in range(8):  # a longer name, a longer header: lengths are multiples of 8
        names = ["a" * (16 * length + 1), "b", "c"]
        description = {"model": options, "channels": 1, "class_names": names,
                       "preprocessing": {"mean": 0.25, "std": 0.5}}  # fmt: skip
        checkpoint.save_model(tmp_path / "m", helpers.vit_variables(model), description)
        path = tmp_path / f"{length}.safetensors"
        convert.export(tmp_path / "m", path)
        content = path.read_bytes()
        first_bytes.add(content[0])
        header, data = np.split(np.frombuffer(content[8:], np.uint8), [header_length(content)])
        # The same file with a header that begins like a pickle.
        header = header.tobytes() + b" " * ((0x80 - len(header)) % 256)
        path.write_bytes(len(header).to_bytes(8, "little") + header + data.tobytes())
        found = convert.load(path)
        assert found.description["class_names"] == names
        assert found.description["preprocessing"]["mean"] == 0.25
        assert found.model.attention.variant == "kdgqa"
    assert len(first_bytes) > 4


def refusal(path, **options):
    with pytest.raises(UserError) as error:
        convert.load(path, **options)
    text = str(error.value)
    assert "\n" not in text and str(path) in text
    return text


def test_a_header_that_is_cut_off_is_one_of_a_safetensors_file(tmp_path, weights):
    path = tmp_path / "a.safetensors"
    path.write_bytes(padded(weights, 0x80)[:900])
    assert "damaged safetensors file, cut off in its header" in refusal(path)


def test_names_that_are_there_twice_are_refused(tmp_path, weights):
    content = padded({"a": np.zeros(2, np.float32), "b": np.ones(2, np.float32)}, 0)
    path = tmp_path / "a.safetensors"
    path.write_bytes(content.replace(b'"b"', b'"a"'))
    assert "holds more than one array or record of the name a;" in refusal(path)

    path = tmp_path / "a.npz"
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "w") as archive:
        for value in (0, 1):
            file = io.BytesIO()
            np.save(file, np.full(3, value, np.float32))
            archive.writestr("x.npy", file.getvalue())
    assert "of the name x.npy;" in refusal(path)

    path = tmp_path / "a.pth"
    tensors = {name: torch.from_numpy(x) for name, x in weights.items()}
    torch.save({"model": tensors, "state_dict": tensors}, path)
    assert "holds two state dicts, under 'model' and 'state_dict'" in refusal(path)


@pytest.mark.parametrize("prefix", ["module.", "vit."])
def test_a_parameter_under_two_names_is_refused(tmp_path, weights, prefix):
    if prefix == "vit.":
        query = "encoder.layer.0.attention.attention.query.weight"
        weights = {"embeddings.cls_token": weights["cls_token"], query: weights["pos_embed"][0]}
    twice = next(iter(weights))
    save_file({**weights, prefix + twice: weights[twice] + 1}, tmp_path / "a.safetensors")
    said = refusal(tmp_path / "a.safetensors")
    assert f"of one parameter under two names: {twice} and {prefix}{twice}" in said


@pytest.mark.filterwarnings("ignore")
def test_quantized_and_sparse_tensors_are_named(tmp_path, weights):
    tensors = {name: torch.from_numpy(x) for name, x in weights.items()}
    name = "blocks.0.mlp.fc1.weight"
    special = {
        "qint8": torch.quantize_per_tensor(tensors[name], 0.1, 0, torch.qint8),
        "sparse_coo": tensors[name].to_sparse(),
        "sparse_csr": tensors[name].to_sparse_csr(),
        "float8_e4m3fn": tensors[name].to(torch.float8_e4m3fn),
        "complex64": tensors[name].to(torch.complex64),
        "float32 meta": tensors[name].to("meta"),
    }
    for kind, tensor in special.items():
        path = tmp_path / "a.pth"
        torch.save({**tensors, name: tensor}, path)
        said = refusal(path)
        assert "no dense arrays of plain numbers" in said and f"{name} ({kind}" in said
    from safetensors.torch import save_file as save_torch

    path = tmp_path / "a.safetensors"
    save_torch({**tensors, name: special["float8_e4m3fn"]}, path)
    assert f"no dense arrays of plain numbers: {name} (F8_E4M3);" in refusal(path)
    save_torch({**tensors, name: tensors[name].to(torch.int8)}, path)
    assert f"(quantized? save them dequantized): {name} (int8)" in refusal(path, num_heads=6)


# --- more than there is -------------------------------------------------------------------------


def bomb(path, size, declared=None):
    """An .npz of zeros, packed; its header may declare another shape."""
    file = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (declared or size // 4,)}
    np.lib.format.write_array_header_1_0(file, header)
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w") as out,
    ):
        out.write(file.getvalue())
        for _ in range(size // 2**20):
            out.write(bytes(2**20))


def test_an_npz_that_unpacks_to_much_more_is_refused_before_it_is(tmp_path, monkeypatch):
    bomb(tmp_path / "a.npz", 2**27)
    packed = (tmp_path / "a.npz").stat().st_size
    assert packed < 2**18
    monkeypatch.setattr(np.lib.format, "read_array", None)  # not one array is unpacked
    said = refusal(tmp_path / "a.npz")
    assert f"refused, not unpacked: its {packed:,} bytes would become 134,217," in said


def test_an_npz_that_declares_more_than_it_holds_is_refused(tmp_path):
    bomb(tmp_path / "a.npz", 2**20, declared=10**12)
    assert "declares 4000000000" in refusal(tmp_path / "a.npz")


def test_tensors_that_share_or_expand_their_storage_are_refused_beyond_it(tmp_path):
    torch.save({"x": torch.zeros(1).expand(2**28)}, tmp_path / "a.pth")
    assert "would become 1,073,741,824" in refusal(tmp_path / "a.pth")
    shared = torch.zeros(2**20)
    torch.save({f"x{i}": shared for i in range(64)}, tmp_path / "b.pth")
    assert "refused, not unpacked" in refusal(tmp_path / "b.pth")


def test_a_packed_torch_file_is_read_while_it_is_small(tmp_path, weights):
    torch.save({name: torch.from_numpy(x) for name, x in weights.items()}, tmp_path / "a.pth")
    packed = tmp_path / "b.pth"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        plain = zipfile.ZipFile(tmp_path / "a.pth")
        for name in plain.namelist():
            archive.writestr(name, plain.read(name))
    arrays, _ = formats.read_arrays(packed)
    assert arrays.keys() == weights.keys()
    for name, x in weights.items():
        np.testing.assert_array_equal(arrays[name], x)
