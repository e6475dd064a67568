"""What a selection of latents is compared with: others that are active as often, and random directions (METHODS §6.5)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nnato.corpus import TokenBlocks
from nnato.dictionaries import Dictionary
from nnato.effects import RESAMPLES
from nnato.errors import DictionaryError
from nnato.feature_traits import ActiveTokens, read_tokens
from nnato.features import FeatureResult
from nnato.intervals import LEVEL, Interval
from nnato.models import describe
from nnato.sites import ResidualSite
from nnato.statistics import Progress

if TYPE_CHECKING:
    from nnato.nnsight_setup import TransformersModel

NEAREST = 8
"""A control is drawn among so many latents with the nearest rates."""


def firing_rates(
    model: TransformersModel,
    blocks: TokenBlocks,
    dictionary: Dictionary,
    site: ResidualSite,
    *,
    split: str = "test",
    batch_size: int = 8,
    file: Path | None = None,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Share of ordinary tokens at which each latent is active, float64 (latents,), from a pass over a text.

    Args:
        model: The model.
        blocks: The text, tokenised.
        dictionary: A dictionary of the site.
        site: Where.
        split: Which documents.
        batch_size: Token blocks per forward pass.
        file: Where to keep checkpoints.
        progress: Told of each batch.

    Raises:
        DictionaryError: It belongs to another model or site.
    """
    info = describe(model)
    dictionary.check_fits(info.fingerprint(), site)
    statistic = ActiveTokens(dictionary.to(next(model._module.parameters()).device), site)
    read_tokens(model, info, blocks, statistic, "firing-rates", split=split, batch_size=batch_size, file=file, progress=progress)
    return statistic.rates()


def matched_on_rate(rate: torch.Tensor, chosen: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """As many other latents, each active about as often as one of the chosen ones: the control of a selection.

    The chosen ones take turns in random order; each takes one of the 8 latents left whose rates are nearest to its own, by ratio.

    Args:
        rate: Share of tokens in which each latent is active, float (latents,).
        chosen: Latents, int64 (chosen,).
        seed: Of the order and the draws.

    Returns:
        int64 (chosen,), in the order of the chosen ones; no latent twice, none that is chosen or silent.

    Raises:
        DictionaryError: Too few other latents are ever active.
    """
    rng = np.random.default_rng(seed)
    logs = np.log(np.maximum(rate.double().numpy(), 1e-300))
    free = (rate > 0).numpy().copy()
    free[chosen.numpy()] = False
    if free.sum() < len(chosen):
        raise DictionaryError(f"{len(chosen)} features are chosen, and only {free.sum()} others are ever active: choose fewer")
    left = np.flatnonzero(free)
    found = np.empty(len(chosen), dtype=np.int64)
    for place in rng.permutation(len(chosen)):
        distances = np.abs(logs[left] - logs[int(chosen[place])])
        nearest = np.argsort(distances, kind="stable")[:NEAREST]
        taken = rng.choice(nearest)
        found[place] = left[taken]
        left = np.delete(left, taken)
    return torch.from_numpy(found)


def selection_bias(selected: FeatureResult, matched: FeatureResult, seed: int = 0) -> dict[str, Mapping[str, Interval]]:
    """Mean and median all-token R² of selected latents, of their controls and of random directions, and what selecting changes.

    Intervals are 95 % by bootstrap over features: they say how far another draw of such features could differ, not another text.

    Args:
        selected: One pair, judged by the selected latents.
        matched: The same pair, judged by those of `matched_on_rate`, in the same order.
        seed: Of the bootstrap.

    Returns:
        `mean` and `median` of `selected`, `matched`, `random_directions`, and `difference` (selected less matched, paired).
    """
    values = {
        "selected": selected.scores.r2["transport"].value,
        "matched": matched.scores.r2["transport"].value,
        "random_directions": selected.random.r2["transport"].value,
    }
    found: dict[str, Mapping[str, Interval]] = {name: _averages(one[~torch.isnan(one)], seed) for name, one in values.items()}
    pairs = torch.stack([values["selected"], values["matched"]])
    found["difference"] = _averages(pairs[:, ~torch.isnan(pairs).any(0)], seed)
    return found


def to_json(bias: Mapping[str, Mapping[str, Interval]]) -> dict[str, Any]:
    """What `selection_bias` returned, in JSON."""
    return {name: {key: interval.to_json() for key, interval in parts.items()} for name, parts in bias.items()}


def _averages(values: torch.Tensor, seed: int) -> Mapping[str, Interval]:
    """Mean and median of float64 (features,), or of differences of the first and second row of (2, features), features resampled."""
    numbers = values.cpu().numpy()
    if not numbers.shape[-1]:
        return {"mean": Interval(float("nan")), "median": Interval(float("nan"))}
    drawn = np.random.default_rng(seed).integers(0, numbers.shape[-1], (RESAMPLES, numbers.shape[-1]))
    tails = (1 - LEVEL) / 2, (1 + LEVEL) / 2
    found = {}
    for name, average in (("mean", np.mean), ("median", np.median)):
        one, many = average(numbers, axis=-1), average(numbers[..., drawn], axis=-1)
        if numbers.ndim == 2:
            one, many = one[0] - one[1], many[0] - many[1]
        low, high = np.quantile(many, tails)
        found[name] = Interval(float(one), float(low), float(high))
    return found
