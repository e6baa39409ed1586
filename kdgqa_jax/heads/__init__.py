"""Fewer and narrower heads: parameters of one model into those of a smaller one, arrays alone.

    from kdgqa_jax import convert
    grouped = convert.group_heads(before, variables, after, pooling="svd", images=images)

Nothing here reads a file or knows a layout: checkpoints of any source and the models of a study
come through the same functions, all of which kdgqa_jax.convert has by name, too.

grouping.py does all of it for a model: pooling.py pools the heads of a group; merging.py
(merging_vit.py all layers) merges them with less loss and makes them narrower, which
merging_problem.py states, a rule of merging_rules.py solves, and moments.py that calibration.py
gathers weigh; refitting.py lets the output projections follow, by ridge.py. forecast.py says what
that discards and what it has meant, suggesting.py how few heads would do.
"""
