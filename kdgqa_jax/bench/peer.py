"""PyTorch's multi-head ViT in a process of its own, which runs a step whenever it is asked to.

Started as a script, this file is that process. It imports PyTorch and nothing of JAX.
"""

import contextlib
import json
import re
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
        return self._ask("step")["seconds"]

    def parts(self) -> dict[str, float]:
        """Run one step there under its profiler; seconds by kind, see `bench.traces`. On CPUs."""
        return self._ask("parts")["parts"]

    def _ask(self, what: str) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{what}\n")
            self._process.stdin.flush()
        return self._read()

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


_KINDS = (
    ("optimizer", r"Optimizer\.step"),
    ("linear layers", r"linear|addmm|aten::mm|convolution|AddmmBackward|MmBackward|TBackward"),
    ("attention", r"attention|Attention"),
    ("activation", r"gelu|Gelu"),
    ("norms", r"layer_norm|LayerNorm"),
    ("copies and slices", r"aten::(cat|clone|contiguous|copy_|fill_|slice_backward|zero_)"),
)
"""Kinds of operations by their names in PyTorch, as far as there are the ones of `traces.KINDS`."""


def _parts(step: Callable[[], float]) -> dict[str, float]:
    """Seconds by kind of operation of one step; an operation is of its own kind or its caller's."""
    import torch

    with torch.profiler.profile() as profile:
        step()
    seconds: dict[str, float] = {}
    for event in profile.events():
        callers, caller = [], event
        while caller is not None:
            callers.append(caller.name)
            caller = caller.cpu_parent
        found = (kind for name in callers for kind, pattern in _KINDS if re.search(pattern, name))
        kind = next(found, "other")
        seconds[kind] = seconds.get(kind, 0.0) + event.self_cpu_time_total * 1e-6
    return seconds


def _serve() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever libraries print
    try:
        step, name = _make_step(json.loads(sys.argv[1]))
        print(json.dumps({"name": name}), file=answers, flush=True)
        for line in sys.stdin:
            answer = {"parts": _parts(step)} if line.strip() == "parts" else {"seconds": step()}
            print(json.dumps(answer), file=answers, flush=True)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
