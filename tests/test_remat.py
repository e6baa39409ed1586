"""Rematerialisation: the same numbers from less memory, and the groups of the forward pass."""

import re

import helpers
import jax
import pytest
from helpers import images, tiny_vit, vit_variables
from test_vit import training_step

from kdgqa_jax import tree_utils, vit


@pytest.mark.parametrize(
    "remat, scan_layers",
    [*((name, False) for name in vit.REMAT_POLICIES if name != "none"), ("full", True)],
)
def test_remat_changes_no_number(remat, scan_layers):
    plain = training_step("kdgqa", depth=1)
    again = training_step("kdgqa", scan_layers, depth=1, remat=remat)
    helpers.assert_close(again[0], plain[0], 1e-5)
    helpers.assert_close(again[1], plain[1], 1e-5)
    helpers.assert_close(again[2], plain[2], 1e-5, scale=helpers.largest(plain[2]))


def test_remat_allocates_once():
    """A backward pass has the groups of its forward pass, without norms of the batch once more."""
    variables = vit_variables(tiny_vit("kdgqa"))

    def allocations(**options):
        stacked = {name: tree_utils.stack_layers(tree) for name, tree in variables.items()}
        given = stacked if "scan_layers" in options else variables
        model = tiny_vit("kdgqa", **options)

        def total(params):
            return model.apply({**given, "params": params}, images(), train=True).sum()

        jaxpr = str(jax.make_jaxpr(jax.grad(total))(given["params"]))
        return len(re.findall(r"\bsqrt\b", jaxpr))  # of the norms

    for layout in ({}, {"scan_layers": True}):
        once = allocations(**layout)
        assert once > 0
        for remat in vit.REMAT_POLICIES:
            assert allocations(remat=remat, **layout) == once, remat


def test_remat_keeps_less():
    def kept_bytes(remat):
        model = tiny_vit("kdgqa", remat=remat)
        variables = vit_variables(model)

        def backward(params):
            return jax.vjp(lambda p: model.apply({"params": p}, images(), train=True), params)[1]

        leaves = jax.tree.leaves(jax.eval_shape(backward, variables["params"]))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    sizes = [kept_bytes(name) for name in ("full", "dots_no_batch", "dots", "none")]
    assert sizes == sorted(set(sizes)), sizes
