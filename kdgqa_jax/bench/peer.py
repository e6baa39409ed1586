"""PyTorch's multi-head ViT in a process of its own, which runs a step whenever it is asked to.

Started as a script, this file is that process. It imports PyTorch and nothing of JAX.
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

# --- This side: the process that measures --------------------------------------------------------


class Peer:
    """The other process.

    Attributes:
      name: what is measured there.
    """

    def __init__(self, process: subprocess.Popen):
        self._process = process
        self.name = self._read()["name"]

    def step(self) -> float:
        """Run one step there; its seconds. Raises UserError if the process has failed."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
        return self._read()["seconds"]

    def _read(self) -> dict[str, Any]:
        from kdgqa_jax.errors import UserError, one_line

        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": "it ended"}
        if "error" in answer:
            reason = one_line(answer["error"])
            raise UserError(
                f"the step of PyTorch failed ({reason}); it needs torch, and timm or transformers"
            )
        return answer


@contextlib.contextmanager
def started(options: dict[str, Any]) -> Iterator[Peer]:
    """A peer that waits between its steps. Raises UserError if it cannot be had.

    Args:
      options: see `_make_step`.
    """
    command = [sys.executable, "-P", __file__, json.dumps(options)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield Peer(process)
        finally:
            process.kill()


# --- The other side ------------------------------------------------------------------------------


def _model(options: dict[str, Any]) -> tuple[Any, str]:
    """(a module: images BCHW -> logits, its name): of timm, or without it of transformers."""
    height, width = options["image_shape"]
    try:
        import timm
        from timm.models.vision_transformer import VisionTransformer

        model = VisionTransformer(
            img_size=(height, width),
            patch_size=options["patch_size"],
            embed_dim=options["width"],
            depth=options["depth"],
            num_heads=options["num_heads"],
            mlp_ratio=options["mlp_width"] / options["width"],
            num_classes=options["classes"],
        )
        return model, f"timm {timm.__version__}"
    except Exception:  # not there, or unfit for this PyTorch
        import transformers
        from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=(height, width),
        patch_size=options["patch_size"],
        hidden_size=options["width"],
        num_hidden_layers=options["depth"],
        num_attention_heads=options["num_heads"],
        intermediate_size=options["mlp_width"],
        num_labels=options["classes"],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    model = ViTForImageClassification(config)
    forward = model.forward
    model.forward = lambda images: forward(images).logits
    return model, f"transformers {transformers.__version__}"


def _make_step(options: dict[str, Any]) -> tuple[Callable[[], float], str]:
    """(a step, which returns its seconds; what it is).

    Args:
      options: train (bool), width, depth, num_heads, mlp_width, patch_size, image_shape, classes,
        batch_size, dtype ("float32", or another that autocast takes), gpu (compiled there), seed.
    """
    import torch

    torch.manual_seed(options["seed"])
    device = "cuda" if options["gpu"] and torch.cuda.is_available() else "cpu"
    model, library = _model(options)
    model = model.to(device).train(options["train"])
    name = f"torch {torch.__version__}, {library}"
    run = model
    if device == "cuda":
        run, name = torch.compile(model), f"{name}, compiled"
    half = options["dtype"] != "float32"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01)
    images = torch.randint(0, 256, (options["batch_size"], *options["image_shape"], 3))
    images = images.to(torch.uint8).to(device)
    labels = torch.randint(0, options["classes"], (options["batch_size"],)).to(device)

    def forward() -> Any:
        pixels = (images.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
        with torch.autocast(device, getattr(torch, options["dtype"]), enabled=half):
            logits = run(pixels)
        return torch.nn.functional.cross_entropy(logits.float(), labels), logits

    def step() -> float:
        started = time.perf_counter()
        if options["train"]:
            optimizer.zero_grad()
            loss, _ = forward()
            loss.backward()
            optimizer.step()
        else:
            with torch.inference_mode():
                loss, logits = forward()
                logits.topk(5)
        loss.item()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return step, name


def _serve() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever libraries print
    try:
        step, name = _make_step(json.loads(sys.argv[1]))
        print(json.dumps({"name": name}), file=answers, flush=True)
        for _ in sys.stdin:
            print(json.dumps({"seconds": step()}), file=answers, flush=True)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
