"""The static options of one attention call."""

import dataclasses
import math
from typing import Literal

from pallas_kernels.prng import Rounds

Mode = Literal["exact", "record", "sequence"]


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """Everything about a call that is known when it is compiled.

    All of it is public: nothing here may be computed from private data.

    Attributes:
        mode: ``exact`` (softmax attention), ``record`` (noisy bounded sums over the
            keys) or ``sequence`` (softmax attention plus noise on each output row).
        scale: factor on the logits.
        is_causal: row t sees the columns s <= t.
        window: ``(left, right)``: row t sees t - left <= s <= t + right.
        value_clip: C, the largest norm of a value row of one head (noisy modes).
        logit_bound: U, the largest logit that still counts (record mode).
        bound_logits: False leaves out the ``min`` with U: only for a caller who has made
            sure of ``scale·‖q‖·‖k‖ <= U`` by bounding the norms of queries and keys.
        numerator_std: standard deviation of the noise on each coordinate of the
            numerator (record) or of the output row (sequence).
        denominator_std: standard deviation of the noise on the sum of weights (record).
        denominator_floor: the noisy sum of weights is not divided by less than this.
        grid: noisy sums are rounded to multiples of a power of two near
            ``std · 2^-grid``; None leaves them in float32 (comparisons in tests only:
            the digits of an unrounded float reveal its summands).
        rounds: of ChaCha, 8, 12 or 20; ``"threefry"`` for reproducible tests only.
    """

    mode: Mode
    scale: float
    is_causal: bool = False
    window: tuple[int, int] | None = None
    value_clip: float = math.inf
    logit_bound: float = math.inf
    bound_logits: bool = True
    numerator_std: float = 0.0
    denominator_std: float = 0.0
    denominator_floor: float = 0.0
    grid: int | None = 10
    rounds: Rounds = 20

    @property
    def is_noisy(self) -> bool:
        """Whether the call adds noise, and so needs a key."""
        return self.mode != "exact"

    def spacing(self, std: float) -> float:
        """The spacing of the public grid for a noise of standard deviation ``std``."""
        if self.grid is None or std == 0.0:
            return 0.0
        return 2.0 ** (math.floor(math.log2(std)) - self.grid)
