"""The layer with every implementation asked for by name, where it runs and where it does not."""

import helpers
import jax
import numpy as np
import pytest

from kdgqa_jax.errors import UserError
from kdgqa_jax.kernels import IMPLEMENTATIONS


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_maps_of_a_layer_are_seen_with_every_implementation(name):
    """Its variables are made, and maps looked at, where the kernel itself does not run."""
    module, x = helpers.layer("kdgqa", implementation=name), helpers.tokens()
    variables = helpers.fast_jit(module.init)(jax.random.key(0), x)
    maps = module.apply(variables, x, mutable=["intermediates"])[1]["intermediates"]["maps"]
    reference = helpers.layer("kdgqa", implementation="xla")
    expected = reference.apply(variables, x, mutable=["intermediates"])[1]["intermediates"]["maps"]
    np.testing.assert_array_equal(maps, expected)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [{"attention": "pgqa"}, {"attn_dropout": 0.5}])
def test_noise_and_dropout_on_maps_are_refused_where_there_are_none(name, options):
    module = helpers.layer(**{"attention": "gqa", "implementation": name} | options)
    variables, x = helpers.layer_variables(module), helpers.tokens()

    def train():
        return module.apply(variables, x, train=True, step=0, rngs=helpers.rngs())

    if name == "xla":
        assert np.isfinite(train()).all()
    else:
        with pytest.raises(UserError, match=f"'{name}' cannot serve here: it makes no attention"):
            train()
