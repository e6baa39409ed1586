"""What is read from compiled programs."""

import types

import helpers
import jax
import jax.numpy as jnp
import pytest

from kdgqa_jax import aot, config

PROGRAM = """HloModule jit_train_step, entry_computation_layout={()->f32[2]{0}}

%fused (p: f32[4,8]) -> f32[4] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %gather.1 = f32[4]{0} gather(%p), metadata={op_name="jit(train_step)/augmentation/gather"}
}

%layer (state: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %state = (s32[], bf16[4,8]{1,0}) parameter(0)
  %dot = bf16[4,8]{1,0} fusion(%state), metadata={op_name="jit(f)/transpose(jvp(V))/blocks/attn/query/dot_general"}, backend_config={"estimated_cycles":"100"}
  %sum = (bf16[4,8]{1,0}, bf16[2]{0}) all-reduce-start(%dot), metadata={op_name="psum"}
  ROOT %out = (s32[], bf16[4,8]{1,0}) tuple(%sum)
}

%more (state: (s32[], bf16[4,8])) -> pred[] {
  ROOT %less = pred[] compare(), direction=LT
}

ENTRY %main (a: f32[4,8]) -> f32[2] {
  %a = f32[4,8]{1,0} parameter(0)
  %f = f32[4]{0} fusion(%a), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/augmentation/gather"}
  %loop = (s32[], bf16[4,8]{1,0}) while(%f), condition=%more, body=%layer, backend_config={"known_trip_count":{"n":"12"}}
  %gather = f32[64]{0} all-gather(%a), dimensions={0}
  %kernel = f32[8]{0} custom-call(%a), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/jvp(V)/blocks_0/attn/pallas_call"}
  ROOT %update = f32[2]{0} add(%a, %a), metadata={op_name="jit(f)/optimizer/add"}, backend_config={"estimated_cycles":"7"}
}
"""  # noqa: E501


# Some compilers leave how often a loop is run to its condition.
COUNTED = PROGRAM.replace(', backend_config={"known_trip_count":{"n":"12"}}', "").replace(
    "  ROOT %less", "  %limit = s32[]{:T(128)} constant(12)\n  ROOT %less"
)


@pytest.mark.parametrize("text", [PROGRAM, COUNTED])
def test_cycles_collectives_and_what_is_not_priced(text):
    memory = types.SimpleNamespace(
        temp_size_in_bytes=5,
        argument_size_in_bytes=6,
        output_size_in_bytes=4,
        alias_size_in_bytes=3,
        generated_code_size_in_bytes=7,
    )
    program = types.SimpleNamespace(as_text=lambda: text, memory_analysis=lambda: memory)
    costs = aot.read(program)
    assert (costs.temporary_bytes, costs.argument_bytes, costs.memory_bytes) == (5, 6, 19)
    assert costs.cycles == {"attention, backward": 1200, "optimizer": 7}
    assert costs.collectives == {"all-reduce": (12, 12 * (64 + 4)), "all-gather": (1, 256)}
    assert costs.carried == {"all-reduce": {"other": 12 * 68}, "all-gather": {"other": 256}}
    assert costs.unpriced == 4 and costs.kernels == {"attention, forward": 1}


FUSED = """HloModule jit_train_step

%gathering (p: bf16[4,2]) -> bf16[4,8] {
  %p = bf16[4,2]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[4,8]{1,0} all-gather(%p), channel_id=6, dimensions={1}
}

%ending (p: bf16[4,2]) -> bf16[4,8] {
  %p = bf16[4,2]{1,0} parameter(0)
  %all-gather.2 = bf16[4,8]{1,0} all-gather(%p), channel_id=6, dimensions={1}
  ROOT %done = bf16[4,8]{1,0} custom-call(%all-gather.2)
}

%all-reduce-scatter.clone (p: bf16[4,8]) -> bf16[1,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  %all-reduce.1 = bf16[4,8]{1,0} all-reduce(%p), channel_id=7, to_apply=%add
  ROOT %slice = bf16[1,8]{1,0} dynamic-slice(%all-reduce.1)
}

ENTRY %main (a: bf16[4,2]) -> bf16[1,8] {
  %a = bf16[4,2]{1,0} parameter(0)
  %start = bf16[4,8]{1,0} fusion(%a), kind=kCustom, calls=%gathering
  %end = bf16[4,8]{1,0} fusion(%start), kind=kCustom, calls=%ending
  ROOT %scattered = bf16[1,8]{1,0} fusion(%end), kind=kCustom, calls=%all-reduce-scatter.clone, metadata={op_name="jit(f)/transpose(jvp(V))/blocks/mlp/fc1/dot_general"}
}
"""  # noqa: E501


def test_collectives_that_are_fused_count_once():
    names = ("temp", "argument", "output", "alias")
    memory = types.SimpleNamespace(**{f"{name}_size_in_bytes": 0 for name in names})
    memory.generated_code_size_in_bytes = 0
    costs = aot.read(types.SimpleNamespace(as_text=lambda: FUSED, memory_analysis=lambda: memory))
    assert costs.collectives == {"all-gather": (1, 64), "reduce-scatter": (1, 16)}
    assert costs.carried["reduce-scatter"] == {"mlp, backward": 16}


@pytest.mark.parametrize("build", [aot.abstract_train_step, aot.abstract_eval_step])
def test_steps_are_built_without_arrays(build):
    settings = config.train_config()
    settings.model.name, settings.model.image_size, settings.batch_size = "mu/4", 8, 6
    step, variables, batch = build(settings, num_classes=7, channels=1)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves((variables, batch)))
    assert batch["image"].shape == (6, 8, 8, 1) and batch["image"].dtype == jnp.uint8
    compiled = helpers.fast_jit(step).lower(variables, batch).compile()
    costs = aot.read(compiled)
    assert costs.temporary_bytes > 0 and costs.argument_bytes > 0 and not costs.collectives
