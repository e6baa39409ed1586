"""Which grouping helps? The whole protocol from scratch on Fashion-MNIST, with statistics.

    kdgqa study --config fashion_mnist --workdir DIR --jobs 2
    kdgqa study --config fashion_mnist --dry-run

All six variants with half and with a quarter of the key/value heads (N = 8), five seeds: pretrained
(6 epochs), converted by means, uptrained (an epoch), fine-tuned for another on images that
are turned by 90 degrees and inverted.

Argument string: `fashion_mnist:dataset=digits` is the same in small, on scikit-learn's digits;
`data_dir=DIR` where the four IDX files of Fashion-MNIST are.
"""

from kdgqa_jax.config import parse_arg
from kdgqa_jax.configs import _studies


def get_config(arg=""):
    """The config of the study."""
    arg = parse_arg(arg, dataset="fashion_mnist", data_dir=_studies.FASHION_DIR)
    config = _studies.from_scratch(arg.dataset, arg.data_dir)
    config.grid = ("num_kv_heads=4|2",)
    config.seeds = 5
    return config
