"""Curves of the runs of docs/fashion_mnist.md: `fashion_mnist_curves.py RUNS OUT.png`."""

import pathlib
import sys

import matplotlib

from kdgqa_jax.logs import read_metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = {
    "pretrain": ["pretrain"],
    "uptrain": ["uptrain_gqa", "uptrain_dgqa_ema"],
    "finetune": ["finetune_gqa", "finetune_dgqa_ema"],
}


def main(runs: str, out: str) -> None:
    """One panel per job: the loss of logged batches, and above it the test top-1."""
    figure, axes = plt.subplots(2, 3, figsize=(10, 5), layout="constrained", sharey="row")
    for column, (job, names) in enumerate(PANELS.items()):
        for name, style in zip(names, ("-", "--"), strict=False):
            records = read_metrics(pathlib.Path(runs) / name)
            for axis, split, value in ((axes[0], "test", "top1"), (axes[1], "train", "loss")):
                chosen = [r for r in records if r["split"] == split]
                steps, values = [r["step"] for r in chosen], [r[value] for r in chosen]
                marker = "o" if split == "test" else None
                axis[column].plot(steps, values, style, marker=marker, label=name)
        axes[0, column].set_title(job)
        axes[0, column].legend()
        axes[1, column].set_xlabel("update")
    axes[0, 0].set_ylabel("test top-1, %")
    axes[1, 0].set_ylabel("training loss, nats")
    figure.savefig(out, dpi=100)


if __name__ == "__main__":
    main(*sys.argv[1:])
