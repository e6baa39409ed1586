"""Checkpoints in and out: reading every ViT that people have, grouping its heads, and back.

    converted = convert.load("vit_base.safetensors", attention="kdgqa", num_kv_heads=6)
    print(converted.report)
    converted.save("vit_base_kdgqa")     # a model directory

files.py reads what is at a place, formats.py and shards.py the arrays in files; sources/ knows, a
file for each framework, what it calls them, how they become ours and what is said beside them;
preprocessing.py how images were prepared. structure.py and inference.py find out the architecture,
resizing.py changes sizes. loading.py puts all together with what kdgqa_jax.heads makes of heads,
and exporting.py goes back to PyTorch names.

Encoders of transformers: encoder_table.py says what they call their parts, encoders.py reads them,
encoder_forward.py computes them, encoder_inputs.py makes what they take, merging_encoder.py merges
their heads.
"""

from kdgqa_jax.convert.calibration_images import CalibrationImages
from kdgqa_jax.convert.exporting import export, to_pytorch
from kdgqa_jax.convert.loading import Converted, load
from kdgqa_jax.convert.merging_encoder import MergedEncoder, merge_encoder
from kdgqa_jax.convert.resizing import adapt_input_channels, resize_pos_embed
from kdgqa_jax.convert.suggesting import suggest_kv_heads
from kdgqa_jax.heads.calibration import gather_moments
from kdgqa_jax.heads.grouping import Grouped, group_heads
from kdgqa_jax.heads.merging import Merged, balance_heads, merge_heads
from kdgqa_jax.heads.merging_rules import MERGING
from kdgqa_jax.heads.merging_vit import to_merged
from kdgqa_jax.heads.moments import InputMoments, data_free_moments
from kdgqa_jax.heads.pooling import POOLING, pool_heads, to_grouped
from kdgqa_jax.heads.refitting import refit_outputs
from kdgqa_jax.heads.ridge import refit_output
from kdgqa_jax.heads.suggesting import SUGGESTION_HEADER

__all__ = [
    "MERGING",
    "POOLING",
    "SUGGESTION_HEADER",
    "CalibrationImages",
    "Converted",
    "Grouped",
    "InputMoments",
    "Merged",
    "MergedEncoder",
    "adapt_input_channels",
    "balance_heads",
    "data_free_moments",
    "export",
    "gather_moments",
    "group_heads",
    "load",
    "merge_encoder",
    "merge_heads",
    "pool_heads",
    "refit_output",
    "refit_outputs",
    "resize_pos_embed",
    "suggest_kv_heads",
    "to_grouped",
    "to_merged",
    "to_pytorch",
]
