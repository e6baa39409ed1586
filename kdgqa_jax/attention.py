"""Grouped query attention: one Flax module for every variant, and the table of variants.

    B  batch             T  query tokens        S  key/value tokens (S == T in self-attention)
    N  query heads       K  key/value heads     D  model width
    H  width of one query or key head           V  width of one value head

The variants differ in two places only: the rule that groups query heads (rules.py) and whether
noise is subtracted (noise.py). `VARIANTS` is the table of those two choices; `register` adds a row.
The pure function behind the module is `grouped_attention`, in kernels/.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from kdgqa_jax import allocation as alloc
from kdgqa_jax import noise as noise_lib
from kdgqa_jax import options, rules
from kdgqa_jax.errors import UserError, check_positive, check_rate, unknown
from kdgqa_jax.kernels import EXPANSIONS, IMPLEMENTATIONS, grouped_attention
from kdgqa_jax.layers import layer_norm
from kdgqa_jax.options import ARCHITECTURE, CONVERSION, PROGRAM, RUN, SIZE, option

Array = jax.Array


# --- the table of variants ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Variant:
    """What a name stands for.

    Attributes:
      rule: the class of the grouping rule.
      noise: the class of what is subtracted from maps or output; None: nothing.
      multi_head: K is N.
    """

    rule: type[rules.Rule] = rules.Equal
    noise: type[noise_lib.Noise] | None = None
    multi_head: bool = False

    @property
    def parts(self) -> tuple[type, ...]:
        """The classes whose fields are the options of this variant."""
        return (self.rule,) if self.noise is None else (self.rule, self.noise)


VARIANTS: dict[str, Variant] = {
    "mha": Variant(multi_head=True),
    "gqa": Variant(),
    "kdgqa": Variant(rules.KDGQA),
    "dgqa_ema": Variant(rules.DGQAEma),
    "dgqa_diff": Variant(rules.DGQADiff),
    "pgqa": Variant(noise=noise_lib.Noise),
}
ALIASES = {"mhsa": "mha"}  # the name in the released code

GROUPS = "groups"
"""The group index, as `jax.checkpoint` policies name it."""


def register(name: str, rule: type[rules.Rule], noise: type | None = None) -> None:
    """Give a grouping rule a name; models, configs, conversion and studies know it from then on::

        @dataclasses.dataclass(frozen=True)
        class LastToken(rules.Rule):
            temperature: float = options.option(1.0)

            def scores(self, query, key, memory, mask):
                ...

        attention.register("last_token", LastToken)
        model = vit.create("S/16", attention="last_token", temperature=0.5)

    Raises ValueError: the name is taken, or an option has a name that stands for something else.
    """
    if name in (*VARIANTS, *ALIASES):
        raise ValueError(f"the attention variant {name!r} exists already")
    variant = Variant(rule, noise)
    options.union([AttentionConfig, *_parts(), *variant.parts])
    VARIANTS[name] = variant


def _parts() -> dict[type, None]:
    """The classes with the options of all variants, each of them once."""
    return dict.fromkeys(part for variant in VARIANTS.values() for part in variant.parts)


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
    attention = variant_name(attention)
    if VARIANTS[attention].multi_head:
        if num_kv_heads not in (None, num_heads):
            raise UserError(
                f"attention {attention!r} has as many key/value heads as query heads ({num_heads}),"
                f" but num_kv_heads={num_kv_heads} was asked for; leave it out or choose 'gqa'"
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


# --- the config of a layer ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """What an attention layer is; `configure` makes one from the name of a variant.

    Attributes:
      num_heads: N.
      num_kv_heads: K, which divides N.
      rule: how query heads are grouped.
      noise: what is subtracted from maps or output; None: nothing.
      variant: the name in `VARIANTS` that this was made from.
      attn_dropout: rate on the attention maps.
      qkv_bias: the query, key and value projections have a bias.
      proj_bias: the output projection has a bias.
      head_width: H; None: the model width over N.
      v_head_width: V; None: H.
      qk_norm: a norm over the width of each query and key head, before their products. Rules score
        the keys as they are before it.
      scale_attn_norm: a norm over all heads before the output projection.
      implementation: of attention, see `kernels.grouped_attention`.
      expansion: of key/value heads to query heads, see `kernels.grouped_attention`.

    Raises:
      UserError: options that do not fit together.
    """

    num_heads: int = option(role=SIZE)
    num_kv_heads: int | None = option(role=CONVERSION)
    rule: rules.Rule = dataclasses.field(default_factory=rules.Equal)
    noise: noise_lib.Noise | None = None
    variant: str = "gqa"
    attn_dropout: float = option(0.0, RUN, check=check_rate)
    qkv_bias: bool = option(True, ARCHITECTURE)
    proj_bias: bool = option(True, ARCHITECTURE)
    head_width: int | None = option(None, CONVERSION)
    v_head_width: int | None = option(None, CONVERSION)
    qk_norm: bool = option(False, ARCHITECTURE)
    scale_attn_norm: bool = option(False, ARCHITECTURE)
    implementation: str | None = option(None, PROGRAM, choices=(None, *IMPLEMENTATIONS))
    expansion: str | None = option(None, PROGRAM, choices=(None, *EXPANSIONS))

    def __post_init__(self) -> None:
        options.check(self)
        resolve_num_kv_heads(self.variant, self.num_heads, self.num_kv_heads)
        self.rule.check(self.num_heads, self.num_kv_heads)
        for name in ("head_width", "v_head_width"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))

    def widths_of_heads(self, width: int) -> tuple[int, int]:
        """(H, V) in a model of some width. Raises UserError if its heads are not of one width."""
        head_width = self.head_width
        if head_width is None and width % self.num_heads:
            raise UserError(f"width {width} is not a multiple of the {self.num_heads} query heads")
        head_width = head_width or width // self.num_heads
        return head_width, self.v_head_width or head_width

    @property
    def has_memory(self) -> bool:
        """The collection `norm_stats` has entries for a layer of this kind."""
        return bool(self.initial_memory())

    def initial_memory(self) -> rules.Memory:
        """What `norm_stats` holds for a layer at the start."""
        return self.rule.memory(self.num_heads, self.num_kv_heads)

    def fixed_allocation(self, memory: rules.Memory) -> Array | None:
        """The allocation of every evaluation, (K,) int32; None where images decide about it.

        Args:
          memory: what `norm_stats` holds for one layer; {} where there is none.
        """
        return self.rule.fixed_allocation(memory, self.num_heads, self.num_kv_heads)

    def arguments(self) -> dict[str, Any]:
        """The arguments of `configure` that give the same config: JSON values."""
        parts = [self, self.rule, *([] if self.noise is None else [self.noise])]
        values = {n: getattr(part, n) for part in parts for n in options.fields(part)}
        return {"attention": self.variant, **values}


def known_options() -> dict[str, dataclasses.Field]:
    """The options of `configure` by name, those of all variants."""
    return options.union([AttentionConfig, *_parts()])


def configure(
    attention: str, num_heads: int, num_kv_heads: int | None = None, **values: Any
) -> AttentionConfig:
    """The config of a layer of a variant.

    Args:
      attention: a name in `VARIANTS`, or "mhsa".
      num_heads: N.
      num_kv_heads: K; None: N for `mha`, else N/2.
      **values: fields of `AttentionConfig`, and options of any rule or noise in `VARIANTS`; those
        of another variant are checked and left out.

    Raises:
      UserError: an unknown name or option, or options that do not fit together.
    """
    known = known_options()
    for name in values:
        if name not in known:
            raise unknown("attention option", name, known)
    attention = variant_name(attention)
    options.check_kinds(known, {"num_heads": num_heads, "num_kv_heads": num_kv_heads, **values})
    parts = {part: part(**options.chosen(part, values)) for part in _parts()}
    variant = VARIANTS[attention]
    return AttentionConfig(
        num_heads,
        resolve_num_kv_heads(attention, num_heads, num_kv_heads),
        rule=parts[variant.rule],
        noise=parts.get(variant.noise),
        variant=attention,
        **options.chosen(AttentionConfig, values),
    )


# --- the Flax module ----------------------------------------------------------------------------


class GroupedQueryAttention(nn.Module):
    """Self-attention of any variant.

        layer = GroupedQueryAttention(attention.configure("dgqa_ema", num_heads=8, window=100))

    Parameters: query (D,N,H), key (D,K,H), value (D,K,V), out (N,V,D) kernels with biases.
    Collection `norm_stats` (mutable in training): the memory of the rule, such as `key_norm` (K,)
    float32 and `allocation` (K,) int32 for DGQA. Evaluation reads it and changes nothing. RNG
    streams: `dropout`, and `noise` for PGQA.

    Sown when the collection is mutable: `grouping` gets key_norm (the scores), allocation and
    group_index; `intermediates` gets the attention maps BNTS, values BSKV, outputs of the heads
    BTNV and image_norms BK, the Frobenius norms of each image's keys; `inputs` gets what the
    projections see: x BTD, and heads BTNV before the output projection.

    Attributes:
      config: what the layer is.
      dropout: rate on the output projection.
      kernel_init: initialiser of the four projections.
      norm: makes a norm by its name, for `qk_norm` and `scale_attn_norm`.
      dtype: of the computation; None: that of input and parameters. Norms, scores and softmax are
        float32 in any case.
      param_dtype: of the parameters.
    """

    config: AttentionConfig
    dropout: float = 0.0
    kernel_init: Callable[..., Array] = nn.initializers.lecun_normal()
    norm: Callable[[str], nn.Module] = functools.partial(layer_norm, 1e-6)
    dtype: Any = None
    param_dtype: Any = jnp.float32

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
          mask: (B,) bool, False for padded images, which never count in the scores.
        """
        config, width = self.config, x.shape[-1]
        check_rate("dropout", self.dropout)
        head_width, v_head_width = config.widths_of_heads(width)
        self._record("inputs", x=x)
        common = {
            "kernel_init": self.kernel_init,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }

        def heads(count: int, width: int, name: str) -> Array:
            dense = nn.DenseGeneral((count, width), use_bias=config.qkv_bias, name=name, **common)
            return checkpoint_name(dense(x), name)

        query = heads(config.num_heads, head_width, "query")  # BTNH
        key = heads(config.num_kv_heads, head_width, "key")  # BSKH
        value = heads(config.num_kv_heads, v_head_width, "value")  # BSKV

        index = self._group_index(query, key, train, step, mask)
        looked_into = self.is_mutable_collection("intermediates") and not self.is_initializing()
        if looked_into:
            self._record(
                "intermediates",
                values=value,
                image_norms=alloc.key_head_norms(key, per_example=True),
            )
        if config.qk_norm:
            query, key = self.norm("q_norm")(query), self.norm("k_norm")(key)
        perturb, noise = None, config.noise
        if noise is not None and (train or noise.noise_at_eval):
            perturb = functools.partial(noise.subtract, self.make_rng("noise"))
        dropout_rate = config.attn_dropout if train else 0.0
        arguments = {
            "dropout_rate": dropout_rate,
            "dropout_rng": self.make_rng("dropout") if dropout_rate else None,
            "transform_maps": perturb if perturb and noise.noise_target == "maps" else None,
            # Variables are also made where the kernel does not run.
            "implementation": None if self.is_initializing() else config.implementation,
            "expansion": config.expansion,
        }
        if looked_into:
            out, maps = grouped_attention(query, key, value, index, **arguments, return_maps=True)
            self._record("intermediates", maps=maps)
        else:
            out = grouped_attention(query, key, value, index, **arguments)
        if perturb and noise.noise_target == "output":
            out = perturb(out)
        self._record("intermediates", outputs=out)
        out = checkpoint_name(out, "heads")
        if config.scale_attn_norm:
            out = self.norm("norm")(out.reshape(*out.shape[:2], -1)).reshape(out.shape)
        self._record("inputs", heads=out)
        dense = nn.DenseGeneral(
            width, axis=(-2, -1), use_bias=config.proj_bias, name="out", **common
        )
        out = dense(out)
        return nn.Dropout(self.dropout, deterministic=not train)(out)

    def _record(self, collection: str, **values: Array) -> None:
        """Sow values as they are (not in tuples), where somebody asked for the collection."""
        if not self.is_initializing():
            for name, value in values.items():
                self.sow(
                    collection, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None
                )

    def _group_index(
        self, query: Array, key: Array, train: bool, step: Array | int | None, mask: Array | None
    ) -> Array | None:
        """(N,) or (B, N) int32; None for equal groups. Updates `norm_stats`."""
        config, rule = self.config, self.config.rule
        if not rule.dynamic:
            if self.is_mutable_collection("grouping"):
                # Norms that no rule reads are averaged by whoever logs them: no layer waits.
                norms = alloc.key_head_norms(key, mask, per_example=train)
                self._record_groups(norms, config.fixed_allocation({}))
            return None
        memory = self._memory()
        known = {name: kept.value for name, kept in memory.items()}
        scores = rule.scores(query, key, known, mask)
        if self.has_variable("given", "allocation"):
            return self._record_groups(scores, self.get_variable("given", "allocation"))
        if train and not self.is_initializing():
            due = rule.due(step)
            if mask is not None:
                due &= jnp.any(mask)  # nothing is learnt from a batch of padding
            new = rule.update(scores, known, config.num_heads)
            known = {name: jnp.where(due, new[name], x) for name, x in known.items()}
            for name, kept in memory.items():
                kept.value = known[name]
        return self._record_groups(scores, rule.allocate(scores, known, config.num_heads))

    def _memory(self) -> dict[str, nn.Variable]:
        """The variables of `norm_stats` by name, made where there are none yet."""
        initial = self.config.initial_memory()
        there = any(self.has_variable("norm_stats", name) for name in initial)
        if initial and not there and not self.is_mutable_collection("norm_stats"):
            raise UserError(
                f"attention {self.config.variant!r} reads its memory from the collection"
                " 'norm_stats', which is missing; pass all variables that init gave, not the"
                " params alone"
            )
        return {
            name: self.variable("norm_stats", name, lambda x=x: x) for name, x in initial.items()
        }

    def _record_groups(self, scores: Array, allocation: Array) -> Array:
        """Sow them; the group index of the allocation."""
        index = checkpoint_name(alloc.group_index(allocation, self.config.num_heads), GROUPS)
        self._record("grouping", key_norm=scores, allocation=allocation, group_index=index)
        return index
