"""Scores of features where they are active, and of activations, from sums over test tokens (METHODS §6.2, §6.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from nnato.errors import MomentsError
from nnato.operators import TransportOperator
from nnato.sums import PairSums, positive, quantiles

FEWEST_TOKENS, FEWEST_DOCUMENTS = 50, 10
"""With fewer active tokens, or documents that have some, a feature has no scores."""
FEWEST_SAMPLED = 10
"""With fewer active tokens in the sample, a feature has no scores of activations."""
REASONS = ("", "never active", "too few active tokens", "active in too few documents", "its direction does not vary")
"""Why a feature has no scores, by code."""
EXTRAS = ("abs_b", "abs_error", "relative_error", "log_ratio")
"""Sums that only the paper's metrics need: `Σ|b|`, `Σ|a-b|`, `Σ|a-b|/|a|`, `Σ log²(|b|/|a|)`; and of all operators together `Σ|a|`."""


@dataclass(frozen=True)
class ActiveScores:
    """One operator judged where features are active, and by the activations of its predictions.

    Attributes:
        operator: The map.
        active: Sums of the number along the direction and its prediction over active tokens, about the training mean, by fold.
        latent: Sums of the activation and the activation of the prediction over sampled tokens, by fold.
        precision: Share of the sampled tokens where the prediction's latent fires in which the true one does, float64 (features,).
        recall: The reverse.
        auc: How well the prediction's pre-activation separates active sampled tokens from others, float64 (features,).
        unexplained: Share of the prediction's variance that the dictionary does not reconstruct.
        extras: Sums for the paper's metrics, by name of `EXTRAS`; empty unless asked for.
    """

    operator: TransportOperator
    active: PairSums = field(repr=False)
    latent: PairSums = field(repr=False)
    precision: torch.Tensor = field(repr=False)
    recall: torch.Tensor = field(repr=False)
    auc: torch.Tensor = field(repr=False)
    unexplained: float
    extras: Mapping[str, torch.Tensor] = field(repr=False)

    @property
    def f1(self) -> torch.Tensor:
        """Harmonic mean of precision and recall, float64 (features,); 0 if they fire at no common token."""
        both = self.precision.nan_to_num(0.0) + self.recall
        return torch.where(both > 0, 2 * self.precision.nan_to_num(0.0) * self.recall / both, torch.where(torch.isnan(both), both, 0.0))


@dataclass(frozen=True)
class FeaturePass:
    """What one pass over test documents says about features.

    Attributes:
        latents: Which, int64 (features,).
        mean: Training means of the numbers, float64 (features,).
        tokens: Ordinary test tokens.
        sampled: Those of them that the scores of activations are of.
        active: In how many tokens a feature is active, float64 (features,).
        fired: In how many of the sampled ones, float64 (features,).
        documents: In how many documents at least, int64 (features,): documents are told apart by 63 classes of their hash.
        unexplained: Share of the residual's variance that the dictionary does not reconstruct.
        scores: By operator.
        absolute: Σ|a| over active tokens, for the paper's metrics; None unless asked for.
    """

    latents: torch.Tensor
    mean: torch.Tensor
    tokens: int
    sampled: int
    active: torch.Tensor
    fired: torch.Tensor
    documents: torch.Tensor
    unexplained: float
    scores: tuple[ActiveScores, ...]
    absolute: torch.Tensor | None

    @property
    def rate(self) -> torch.Tensor:
        """Share of tokens in which a feature is active, float64 (features,)."""
        return self.active / self.tokens

    def reasons(self, fewest_tokens: int = FEWEST_TOKENS, fewest_documents: int = FEWEST_DOCUMENTS) -> torch.Tensor:
        """Why features have no scores: int64 (features,), places in `REASONS`, 0 for those that have some."""
        code = torch.where(torch.isnan(self.scores[0].active.a.sum(0)), 4, 0)
        code = torch.where(self.documents < fewest_documents, 3, code)
        code = torch.where(self.active < fewest_tokens, 2, code)
        return torch.where(self.active == 0, 1, code)

    def summary(self, number: int = 0, among: slice | None = None) -> dict[str, Any]:
        """Quantiles over the features that have scores, in JSON, with how many these are and why others have none.

        Args:
            number: Which operator.
            among: Only these places of `latents`; all by default.
        """
        one, reasons = self.scores[number], self.reasons()
        kept = torch.zeros(len(reasons), dtype=torch.bool)
        kept[among or slice(None)] = True
        known, reasons = kept & (reasons == 0), reasons[kept]
        enough = known & (self.fired >= FEWEST_SAMPLED)
        found = {
            "active_r2": one.active.r2().value,
            "active_pearson": one.active.pearson(),
            "active_fvu_uncentred": one.active.moved(self.mean).fvu(),
        }
        activations = {
            "latent_r2": one.latent.r2().value,
            "precision": one.precision,
            "recall": one.recall,
            "f1": one.f1,
            "auc": one.auc,
        }
        return {
            "tokens": self.tokens,
            "missing": {name: int((reasons == code).sum()) for code, name in enumerate(REASONS) if code},
            "unexplained": self.unexplained,
            "unexplained_of_predictions": one.unexplained,
            **{name: quantiles(values[known]) for name, values in found.items()},
            "sampled": {"tokens": self.sampled, "features": int(enough.sum())},
            **{name: quantiles(values[enough]) for name, values in activations.items()},
        }


def paper_metrics(result: FeaturePass, number: int = 0) -> dict[str, torch.Tensor]:
    """The paper's metrics of active tokens by their names, float64 (features,) each; NaN where the authors' code says 0 for nothing.

    R² is about the mean of active tokens and clamped to -1e6 … 1, as there.

    Args:
        result: Of a pass with `paper=True`.
        number: Which operator.

    Raises:
        MomentsError: Of a pass without.
    """
    one = result.scores[number]
    if result.absolute is None:
        raise MomentsError("these sums were kept without those of the paper's metrics: make the pass with paper=True")
    raw = one.active.moved(result.mean)
    n, absolute = positive(result.active), result.absolute
    known = torch.where(result.active >= 2, 1.0, float("nan"))
    found = {
        "r2_lat": one.active.r2().value.clamp(-1e6, 1),
        "mse_lat": raw.mse(),
        "r_pearson": raw.pearson(),
        "calibration": raw.cosine(),
        "rms_ratio": raw.rms_ratio(),
        "mean_ratio": raw.mean_ratio(),
        "mean_abs_ratio": one.extras["abs_b"] / absolute,
        "mad_ratio": one.extras["abs_error"] / absolute,
        "rel_error_mean": one.extras["relative_error"] / n,
        "log_mse_ratio": one.extras["log_ratio"] / n,
    }
    return {name: values * known for name, values in found.items()}


def area(inactive: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """Area under the ROC curve from histograms, int32 (features, bins); ties within a bin count half."""
    low, high = inactive.double(), active.double()
    below = low.cumsum(1) - low / 2
    pairs = low.sum(1) * high.sum(1)
    return (high * below).sum(1) / torch.where(pairs > 0, pairs, float("nan"))
