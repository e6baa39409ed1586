"""Grouped query attention: one Flax module for every variant, and the table of variants.

    B  batch             T  query tokens        S  key/value tokens (S == T in self-attention)
    N  query heads       K  key/value heads     H  width of one head     D  model width (N*H)

The variants differ in two places only: where the group index comes from (fixed, from the norms of
now, from remembered norms) and whether noise is subtracted. `VARIANTS` is the table of those two
choices; a new variant is one row and, if its rule is new, one function in allocation.py. The pure
function behind the module is `grouped_attention`, in kernels.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from kdgqa_jax import allocation as alloc
from kdgqa_jax import noise
from kdgqa_jax.errors import UserError, check_rates, unknown
from kdgqa_jax.kernels import EXPANSIONS, IMPLEMENTATIONS, grouped_attention

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Variant:
    """Where the group index comes from, and whether noise is subtracted.

    Attributes:
      rule: scores (and cache) -> allocation; None: the equal grouping, always.
      remembers: the rule also takes and returns the cache of norms, which lives in `norm_stats`.
      options: the fields of `GroupedQueryAttention` that the rule takes by name.
      noise: PGQA, noise is subtracted from the attention maps or from the output.
    """

    rule: Callable[..., Any] | None = None
    remembers: bool = False
    options: tuple[str, ...] = ()
    noise: bool = False

    @property
    def fields(self) -> set[str]:
        """The fields of `GroupedQueryAttention` that this variant reads and another may not."""
        names = set(self.options)
        if self.rule is not None:
            names |= {"importance", "window" if self.remembers else "allocation_scope"}
        if self.noise:
            layer = dataclasses.fields(GroupedQueryAttention)
            names |= {field.name for field in layer if field.name.startswith("noise_")}
        return names


VARIANTS: dict[str, Variant] = {
    "mha": Variant(),
    "gqa": Variant(),
    "kdgqa": Variant(alloc.kdgqa_allocation, options=("min_heads_per_group",)),
    "dgqa_ema": Variant(
        alloc.dgqa_ema_allocation, remembers=True, options=("beta", "min_heads_per_group")
    ),
    "dgqa_diff": Variant(
        alloc.dgqa_diff_allocation, remembers=True, options=("min_heads_per_group",)
    ),
    "pgqa": Variant(noise=True),
}
ALIASES = {"mhsa": "mha"}  # the name in the released code


def variant_name(name: str) -> str:
    """The name in `VARIANTS` for a name or alias. Raises UserError for an unknown one."""
    name = ALIASES.get(name, name)
    if name not in VARIANTS:
        raise unknown("attention variant", name, VARIANTS)
    return name


def resolve_num_kv_heads(attention: str, num_heads: int, num_kv_heads: int | None = None) -> int:
    """K for a variant: N for `mha`, else the number asked for, by default N/2.

    Raises UserError if K does not divide N, or if K != N for `mha`.
    """
    if num_heads < 1:
        raise UserError(f"num_heads={num_heads} must be at least 1")
    if variant_name(attention) == "mha":
        if num_kv_heads not in (None, num_heads):
            raise UserError(
                f"attention 'mha' has as many key/value heads as query heads ({num_heads}), but"
                f" num_kv_heads={num_kv_heads} was asked for; leave it out or choose 'gqa'"
            )
        return num_heads
    if num_kv_heads is None:
        num_kv_heads = max(num_heads // 2, 1)
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        divisors = [k for k in range(1, num_heads + 1) if num_heads % k == 0]
        raise UserError(
            f"num_kv_heads={num_kv_heads} does not divide the {num_heads} query heads;"
            f" choose one of {divisors}"
        )
    return num_kv_heads


# --- the Flax module ----------------------------------------------------------------------------


class GroupedQueryAttention(nn.Module):
    """Self-attention of any variant of `VARIANTS`.

    Parameters: query (D,N,H), key and value (D,K,H), out (N,H,D) kernels with biases.
    Collection `norm_stats` (mutable in training): `key_norm` (K,) float32 and `allocation` (K,)
    int32 for DGQA, `key_gradient` (K,) float32 for importance "gradient". Evaluation reads it and
    changes nothing. RNG streams: `dropout`, and `noise` for PGQA.

    Sown when the collection is mutable: `grouping` gets key_norm, allocation and group_index;
    `intermediates` gets the attention maps BNTS; `inputs` gets what the projections see: x BTD, and
    heads BTNH before the output projection.

    Attributes:
      num_heads: N.
      num_kv_heads: K; None: N for `mha`, else N/2.
      attention: a name in `VARIANTS`, or "mhsa".
      importance: score of a key head, a name in `allocation.IMPORTANCE`.
      allocation_scope: KDGQA: "batch" (as published: one allocation from the norms of the batch) or
        "example" (each image by its own norms: its output does not depend on its batch mates).
      min_heads_per_group: least number of query heads of each key/value head; 0 as published.
      beta: DGQA-EMA: weight of the current norms.
      window: DGQA: the allocation is recomputed in training steps with step % window == 0.
      noise_target: PGQA: "maps" (the paper) or "output" (as released).
      noise_distribution: PGQA: "normal" or "uniform" (as released).
      noise_statistics: PGQA: what the noise matches of the row that it perturbs: "std" (its mean is
        zero, so evaluation without noise sees what training saw on average) or "mean_std" (as
        released, where evaluation is perturbed too).
      noise_scale: PGQA: factor on the noise.
      noise_at_eval: PGQA: perturb in evaluation too. The released code does; the default here is
        False, so that evaluation is deterministic.
      dropout: rate on the output projection.
      attn_dropout: rate on the attention maps.
      qkv_bias: the query, key and value projections have a bias.
      kernel_init: initialiser of the four projections.
      implementation: of attention, see `kernels.grouped_attention`.
      expansion: of key/value heads to query heads, see `kernels.grouped_attention`.
      dtype: of the computation; None: that of input and parameters. Norms, scores and softmax are
        float32 in any case.
      param_dtype: of the parameters.
    """

    num_heads: int
    num_kv_heads: int | None = None
    attention: str = "gqa"
    importance: str = "l2"
    allocation_scope: str = "batch"
    min_heads_per_group: int = 0
    beta: float = 0.9
    window: int = 300
    noise_target: str = "maps"
    noise_distribution: str = "normal"
    noise_statistics: str = "std"
    noise_scale: float = 1.0
    noise_at_eval: bool = False
    dropout: float = 0.0
    attn_dropout: float = 0.0
    qkv_bias: bool = True
    kernel_init: Callable[..., Array] = nn.initializers.lecun_normal()
    implementation: str | None = None
    expansion: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @property
    def variant(self) -> Variant:
        """The row of `VARIANTS`."""
        return VARIANTS[variant_name(self.attention)]

    @property
    def has_memory(self) -> bool:
        """The collection `norm_stats` has entries for this layer."""
        rule = self.variant.rule is not None
        return rule and (self.variant.remembers or self.importance == "gradient")

    def check(self) -> int:
        """Raise UserError for options that do not fit; return K."""
        num_kv_heads = resolve_num_kv_heads(self.attention, self.num_heads, self.num_kv_heads)
        choices = {
            "importance": alloc.IMPORTANCE,
            "allocation_scope": ("batch", "example"),
            "noise_target": noise.TARGETS,
            "noise_distribution": noise.DRAWS,
            "noise_statistics": noise.STATISTICS,
            "implementation": (None, *IMPLEMENTATIONS),
            "expansion": (None, *EXPANSIONS),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), [str(k) for k in known])
        if self.allocation_scope == "example" and self.importance == "gradient":
            raise UserError(
                "importance 'gradient' is one score per layer: use allocation_scope 'batch'"
            )
        if not 0 <= self.min_heads_per_group * num_kv_heads <= self.num_heads:
            raise UserError(
                f"min_heads_per_group={self.min_heads_per_group} for {num_kv_heads} key/value heads"
                f" must be between 0 and {self.num_heads // num_kv_heads}, so that"
                f" {self.num_heads} query heads suffice"
            )
        if self.window < 1 or self.window != int(self.window):
            raise UserError(f"window={self.window} must be a number of steps, at least 1")
        if not 0.0 <= self.beta <= 1.0:
            raise UserError(f"beta={self.beta} must be between 0 and 1")
        check_rates(dropout=self.dropout, attn_dropout=self.attn_dropout)
        return num_kv_heads

    def fixed_allocation(self, memory: Mapping[str, Array]) -> Array | None:
        """The allocation of every evaluation, (..., K) int32; None where images decide about it.

        Args:
          memory: what `norm_stats` holds for this layer; {} where `has_memory` is False.
        """
        if self.variant.rule is None:
            return alloc.equal_allocation(self.num_heads, self.check())
        if self.variant.remembers:
            return memory["allocation"]
        return self._apply_rule(memory["key_gradient"]) if self.importance == "gradient" else None

    @nn.compact
    def __call__(
        self,
        x: Array,
        *,
        train: bool = False,
        step: Array | int | None = None,
        mask: Array | None = None,
    ) -> Array:
        """BTD -> BTD.

        Args:
          x: BTD.
          train: apply dropout and noise, and update `norm_stats`.
          step: the global optimizer step; needed by DGQA in training.
          mask: (B,) bool, False for padded images, whose keys never count in the norms.
        """
        num_kv_heads = self.check()
        width = x.shape[-1]
        if width % self.num_heads:
            raise UserError(
                f"model width {width} is not a multiple of the {self.num_heads} query heads"
            )
        head_width = width // self.num_heads
        self._record("inputs", x=x)
        common = {
            "kernel_init": self.kernel_init,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }

        def heads(count: int, name: str) -> Array:
            dense = nn.DenseGeneral(
                (count, head_width), use_bias=self.qkv_bias, name=name, **common
            )
            return checkpoint_name(dense(x), name)

        query = heads(self.num_heads, "query")  # BTNH
        key = heads(num_kv_heads, "key")  # BSKH
        value = heads(num_kv_heads, "value")  # BSKH

        index = self._group_index(key, num_kv_heads, train, step, mask)
        noise_rng = None
        if self.variant.noise and (train or self.noise_at_eval):
            noise_rng = self.make_rng("noise")
        noise_options = (self.noise_scale, self.noise_distribution, self.noise_statistics)
        options = {
            "dropout_rate": self.attn_dropout if train else 0.0,
            "dropout_rng": self.make_rng("dropout") if train and self.attn_dropout > 0 else None,
            # Variables are also made where the kernel does not run.
            "implementation": None if self.is_initializing() else self.implementation,
            "expansion": self.expansion,
        }
        if noise_rng is not None and self.noise_target == "maps":
            options["transform_maps"] = lambda maps: noise.perturb_maps(
                noise_rng, maps, *noise_options
            )
        if self.is_mutable_collection("intermediates") and not self.is_initializing():
            out, maps = grouped_attention(query, key, value, index, **options, return_maps=True)
            self._record("intermediates", maps=maps)
        else:
            out = grouped_attention(query, key, value, index, **options)
        if noise_rng is not None and self.noise_target == "output":
            out = noise.perturb_output(noise_rng, out, *noise_options)
        out = checkpoint_name(out, "heads")
        self._record("inputs", heads=out)
        out = nn.DenseGeneral(width, axis=(-2, -1), name="out", **common)(out)
        return nn.Dropout(self.dropout, deterministic=not train)(out)

    def _record(self, collection: str, **values: Array) -> None:
        """Sow values as they are (not in tuples), where somebody asked for the collection."""
        if not self.is_initializing():
            for name, value in values.items():
                self.sow(
                    collection, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None
                )

    def _group_index(
        self,
        key: Array,
        num_kv_heads: int,
        train: bool,
        step: Array | int | None,
        mask: Array | None,
    ) -> Array | None:
        """(N,) or (B, N) int32; None for the equal grouping. Updates `norm_stats`."""
        variant = self.variant
        equal = alloc.equal_allocation(self.num_heads, num_kv_heads)
        there = any(self.has_variable("norm_stats", n) for n in ("key_norm", "key_gradient"))
        if self.has_memory and not there and not self.is_mutable_collection("norm_stats"):
            raise UserError(
                f"attention {self.attention!r} reads its memory from the collection 'norm_stats',"
                " which is missing; pass all variables that init gave, not the params alone"
            )
        if variant.rule is None and not self.is_mutable_collection("grouping"):
            return None

        if self.importance == "gradient" and variant.rule is not None:
            gradient = self.variable(
                "norm_stats", "key_gradient", jnp.zeros, num_kv_heads, jnp.float32
            )
            norms = gradient.value
        else:
            per_example = self.allocation_scope == "example" and not variant.remembers
            # Norms that no rule reads are averaged by whoever logs them: no layer waits for others.
            per_example |= variant.rule is None and train
            importance = "l2" if self.importance == "gradient" else self.importance
            norms = alloc.key_head_norms(key, mask, per_example=per_example, importance=importance)

        if variant.rule is None:
            allocation = equal
        elif self.has_variable("given", "allocation"):
            allocation = self.get_variable("given", "allocation")
        elif not variant.remembers:
            allocation = self._apply_rule(norms)
        else:
            key_norm = self.variable("norm_stats", "key_norm", jnp.zeros, num_kv_heads, jnp.float32)
            kept = self.variable("norm_stats", "allocation", lambda: equal)
            if train and not self.is_initializing():
                if step is None:
                    raise ValueError(
                        f"attention {self.attention!r} in training needs step=..., the global"
                        " optimizer step"
                    )
                due = step % self.window == 0
                if mask is not None:
                    due &= jnp.any(mask)  # nothing is learnt from a batch of padding
                new_allocation, new_norm = self._apply_rule(norms, key_norm.value)
                key_norm.value = jnp.where(due, new_norm, key_norm.value)
                kept.value = jnp.where(due, new_allocation, kept.value)
            allocation = kept.value

        index = alloc.group_index(allocation, self.num_heads)
        self._record("grouping", key_norm=norms, allocation=allocation, group_index=index)
        return None if variant.rule is None else index

    def _apply_rule(self, *scores: Array) -> Any:
        options = {name: getattr(self, name) for name in self.variant.options}
        return self.variant.rule(*scores, self.num_heads, **options)


def remember_key_gradients(norm_stats: Any, grads: Any) -> Any:
    """Importance "gradient": write each layer's key head gradient norms into `norm_stats`.

    To be called once per update, with the gradients of that update. Layers without the entry
    `key_gradient`, and so every other importance, stay as they are.

    Args:
      norm_stats: the collection, as a nested dict.
      grads: gradients of `params`, a nested dict of the same layout; a leading layer axis may be.

    Returns:
      `norm_stats` with key_gradient[k] = the Frobenius norm, in float32, of the loss gradient on
      the projection (kernel and bias) of key head k.
    """
    if not isinstance(norm_stats, Mapping):
        return norm_stats
    new = {
        name: remember_key_gradients(sub, grads.get(name, {})) for name, sub in norm_stats.items()
    }
    if "key_gradient" in new:
        squares = [jnp.sum(jnp.square(grads["key"]["kernel"].astype(jnp.float32)), axis=(-3, -1))]
        if "bias" in grads["key"]:
            squares.append(jnp.sum(jnp.square(grads["key"]["bias"].astype(jnp.float32)), axis=-1))
        new["key_gradient"] = jnp.sqrt(sum(squares))
    return new
