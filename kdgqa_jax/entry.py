"""Entries of a study: a variant, and by which rule its key/value heads come from those of `mha`.

gqa                 the study's default rule
gqa@first           a rule of pooling or merging, without data
gqa@svd             merged by calibration images
gqa@svd+free        merged without data
kdgqa@svd+refit     merged, and output projections refitted, with calibration images
"""

import dataclasses
from collections.abc import Sequence

from kdgqa_jax.attention import VARIANTS, variant_name
from kdgqa_jax.errors import UserError, unknown
from kdgqa_jax.heads.grouping import BY_DATA, check_pooling

_OPTIONS = ("free", "refit")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of a study's table.

    Attributes:
      name: as records, tables and plots have it: "gqa", or "gqa (svd)".
      folder: as it was asked for, which is its folder's name.
      variant: a name in `attention.VARIANTS`.
      rule: as it was asked for; "" for `mha`, which keeps its heads.
      pooling: a name in `heads.grouping.RULES`.
      free: heads are merged without data.
      refit: output projections are refitted with calibration images.
    """

    name: str
    folder: str
    variant: str
    rule: str = ""
    pooling: str = "mean"
    free: bool = False
    refit: bool = False

    @property
    def calibrated(self) -> bool:
        """Calibration images are needed."""
        return self.refit or (self.pooling in BY_DATA and not self.free)

    @classmethod
    def parse(cls, text: str, default_rule: str) -> "Entry":
        """The entry of `VARIANT[@RULE]`, RULE being POOLING[+free][+refit].

        Raises UserError: an unknown variant, pooling or option, or a rule for `mha`.
        """
        variant, at, rule = text.partition("@")
        name = variant_name(variant)
        if VARIANTS[name].multi_head:
            if at:
                raise UserError(f"entry {text!r}: mha keeps all heads; leave {at + rule!r} out")
            return cls(variant, text, name)
        asked, rule = rule, rule if at else default_rule
        pooling, *options = rule.split("+")
        for option in options:
            if option not in _OPTIONS:
                raise unknown(f"option of the rule {rule!r}", option, _OPTIONS)
        entry = cls(
            f"{variant} ({asked})" if at else variant,
            text,
            name,
            rule,
            pooling,
            free="free" in options,
            refit="refit" in options,
        )
        check_pooling(pooling, entry.calibrated, entry.refit)
        if entry.free and pooling not in BY_DATA:
            raise UserError(f"rule {rule!r}: {pooling} never takes data; leave '+free' out")
        return entry


def parse_entries(texts: Sequence[str], default_rule: str) -> list[Entry]:
    """All entries of a study. Raises UserError: what `Entry.parse` raises, one entry twice."""
    entries = [Entry.parse(text, default_rule) for text in texts]
    kinds = [(entry.variant, entry.rule) for entry in entries]
    if len(set(kinds)) < len(kinds):
        raise UserError(f"variants={tuple(texts)} names one of them twice")
    return entries
