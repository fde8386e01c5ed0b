"""How several adapters become one."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from qlora_dist.config.fields import setting


class MergeMethod(Enum):
    """The rule that makes one adapter out of several."""

    concat = "concat"


class MergeWeights(Enum):
    """What an adapter's share in the merge is proportional to."""

    tokens = "tokens"
    uniform = "uniform"


@dataclass(kw_only=True, slots=True)
class MergeConfig:
    """The merge method, the weights of its parts (they sum to one) and the scale of the whole."""

    method: MergeMethod = setting(MergeMethod.concat)
    weights: MergeWeights = setting(MergeWeights.tokens)
    scale: float = setting(1.0, above=0)
