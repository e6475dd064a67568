"""Transported or synthesised: what intervals of R² and ceiling allow to say about a feature (METHODS §6.4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nnato.errors import MomentsError
from nnato.sums import Estimates, benjamini_hochberg

VERDICTS = ("undetermined", "transported", "synthesised", "mixed")
"""What can be said of a feature, by code."""


@dataclass(frozen=True)
class Thresholds:
    """Where verdicts begin.

    Attributes:
        high: A feature is transported if an operator explains more than this share of its variance.
        low: It is synthesised if no linear map could explain more than this.
        rate: False-discovery rate of each of the two verdicts, and of beating unrelated documents.
        ceiling: Below this lower bound of the ceiling, R² relative to the ceiling is not defined.

    Raises:
        MomentsError: On construction: they are not in order.
    """

    high: float = 0.5
    low: float = 0.2
    rate: float = 0.05
    ceiling: float = 0.05

    def __post_init__(self) -> None:
        if not (0 <= self.low < self.high <= 1 and 0 < self.rate < 1 and 0 <= self.ceiling < 1):
            raise MomentsError(f"thresholds {self.low} and {self.high}, rate {self.rate}: 0 ≤ low < high ≤ 1 and 0 < rate < 1 are needed")


@dataclass(frozen=True)
class Verdicts:
    """One verdict per feature.

    Attributes:
        code: int64 (features,), a place in `VERDICTS`.
        carried: bool (features,): transported features that the shifted identity alone predicts as well as that; the others are *mapped*.
        q_transported: Adjusted p values of "R² is no larger than `high`", float64 (features,).
        q_synthesised: Of "the ceiling is no smaller than `low`".
        q_null: Of "predicted no better than by an operator fitted to unrelated documents".
    """

    code: torch.Tensor
    carried: torch.Tensor
    q_transported: torch.Tensor
    q_synthesised: torch.Tensor
    q_null: torch.Tensor

    def name(self, feature: int) -> str:
        """The verdict in words, `transported (carried)` for example."""
        word = VERDICTS[int(self.code[feature])]
        return f"{word} ({'carried' if self.carried[feature] else 'mapped'})" if word == "transported" else word

    def counts(self, among: torch.Tensor | None = None) -> Mapping[str, int]:
        """How many features have each verdict; `carried` counts among the transported. `among`: bool or int64, only these."""
        code, carried = (self.code, self.carried) if among is None else (self.code[among], self.carried[among])
        return {name: int((code == place).sum()) for place, name in enumerate(VERDICTS)} | {"carried": int(carried.sum())}


def judge(r2: Estimates, ceiling: Estimates, over_null: Estimates, identity: Estimates, thresholds: Thresholds | None = None) -> Verdicts:
    """Say of each feature what its intervals allow.

    *Transported*: the lower bound of the held-out R² is above `high`, also with the rate of false discoveries among all such features
    controlled, and the operator beats one fitted to unrelated documents, likewise. *Synthesised*: the upper bound of the ceiling, which
    no linear map from this source can exceed, is below `low`, with the same control. *Mixed*: the intervals of both lie between.
    Everything else, and every feature without intervals, is undetermined.

    Args:
        r2: Held-out R² of the operator.
        ceiling: Debiased ceiling.
        over_null: R² above that of an operator fitted to unrelated documents.
        identity: Held-out R² of the shifted identity.
        thresholds: Where verdicts begin.
    """
    limits = thresholds or Thresholds()
    q_high, q_low, q_null = (benjamini_hochberg(p) for p in (r2.above(limits.high), ceiling.below(limits.low), over_null.above(0.0)))
    transported = (r2.low >= limits.high) & (q_high <= limits.rate) & (q_null <= limits.rate)
    synthesised = (ceiling.high <= limits.low) & (q_low <= limits.rate) & ~transported
    inside = [(one.low > limits.low) & (one.high < limits.high) for one in (r2, ceiling)]
    mixed = inside[0] & inside[1]
    code = torch.zeros(len(r2.value), dtype=torch.int64)
    for place, said in enumerate((transported, synthesised, mixed), 1):
        code[said.cpu()] = place
    return Verdicts(code, (transported & (identity.low >= limits.high)).cpu(), q_high.cpu(), q_low.cpu(), q_null.cpu())


def relative(r2: Estimates, ceiling: Estimates, thresholds: Thresholds | None = None) -> Estimates:
    """R² relative to its ceiling (METHODS §5.5: η_f), with errors of both; NaN unless the ceiling's lower bound is far enough from zero.

    Args:
        r2: Held-out R², varying with test documents.
        ceiling: Debiased ceiling, varying with training documents.
        thresholds: How far.
    """
    known = ceiling.low > (thresholds or Thresholds()).ceiling
    below = torch.where(known, ceiling.value, float("nan"))
    error = ((r2.error / below).square() + (r2.value * ceiling.error / below.square()).square()).sqrt()
    return Estimates(r2.value / below, error, torch.minimum(r2.degrees, ceiling.degrees))
