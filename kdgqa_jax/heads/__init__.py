"""Fewer key/value heads: parameters of one model into those of a smaller one, arrays alone.

    from kdgqa_jax import convert
    grouped = convert.group_heads(before, variables, after, pooling="svd", images=images)

Nothing here reads a file or knows a layout: checkpoints of any source and the models of a study
come through the same functions, all of which kdgqa_jax.convert has by name, too.

grouping.py does all of it for a model: pooling.py pools the heads of a group; merging.py
(merging_vit.py all layers) merges them with less loss, by a rule of merging_rules.py and by
moments.py that calibration.py gathers; refitting.py lets the output projections follow.
suggesting.py says how few heads would do.
"""
