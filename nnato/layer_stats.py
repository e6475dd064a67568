"""At which layers the latents of a multi-layer SAE are active: additive sums over tokens, O(latents × layers) however long the text.

Of a token t and a latent f, a_l is the activation at layer l, A = Σ_l a_l, and p_l = a_l / A its distribution over layers, where A > 0.
Sums of a, p and of the squared mean layer m = Σ_l l p_l give every distribution over layers and the decomposition of the variance of the
layer (arXiv 2409.04185) without a tensor of layers × tokens × latents: what is computed has an entry for each active latent only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nnato.dip import dip
from nnato.errors import MomentsError
from nnato.intervals import Interval, jackknife

ENTRIES = 1 << 14
"""Active latents, layer by layer, that are sorted at once."""
WEIGHTS = ("activation", "uniform", "published")
"""Ways to weigh pairs of token and latent, by A, all that are active alike, or as in the authors' code, where inactive ones count too."""
_BY_LAYER = ("active", "total", "squares", "peak", "shares")
_BY_LATENT = ("mean_squares", "weighted_mean_squares")


class LayerStats:
    """Sums over tokens; two of different tokens merge exactly.

    Attributes:
        layers: Layer numbers, ascending.
        latents: Number of latents.
        tokens: Tokens so far.
        active: Tokens at which a latent is active at a layer, float64 (latents, layers), like those that follow:
        total: Σ a.
        squares: Σ a².
        peak: The largest a.
        shares: Σ p.
        mean_squares: Σ m² over tokens where the latent is active, float64 (latents,).
        weighted_mean_squares: Σ A m², float64 (latents,).
        spread: Tokens at which a latent is active at exactly j layers, float64 (latents, layers + 1).
        stays: Tokens at which a latent is active at a layer and at the next one, float64 (latents, layers - 1).
        published: The number of batches, and sums over batches of the authors' E[Var(L|F,T)], E[Var(L|F)] and Var(L), float64 (4,).
    """

    def __init__(self, layers: Sequence[int], latents: int, device: torch.device | str = "cpu") -> None:
        self.layers, self.latents, self.tokens = tuple(int(layer) for layer in layers), latents, 0
        count = len(self.layers)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.active, self.total, self.squares, self.peak, self.shares = (zeros(latents, count) for _ in _BY_LAYER)
        self.mean_squares, self.weighted_mean_squares = (zeros(latents) for _ in _BY_LATENT)
        self.spread, self.stays, self.published = zeros(latents, count + 1), zeros(latents, count - 1), zeros(4)

    def add(self, values: torch.Tensor, latents: torch.Tensor) -> None:
        """Add tokens; the call counts as one batch for the published numbers.

        Args:
            values: Activations, float (layers, tokens, k); those that are zero do not count.
            latents: Whose they are, int64 (layers, tokens, k), none twice.
        """
        count, tokens, k = values.shape
        if not tokens:
            return
        shares, places = torch.zeros_like(self.shares), torch.zeros_like(self.mean_squares)
        portion = max(ENTRIES // (count * k), 1)
        for first in range(0, tokens, portion):
            part = slice(first, first + portion)
            self._add(values[:, part], latents[:, part], shares, places)
        self.shares += shares
        self.published += _published(shares / tokens, places / tokens)
        self.tokens += tokens

    def _add(self, values: torch.Tensor, latents: torch.Tensor, shares: torch.Tensor, places: torch.Tensor) -> None:
        """Add a portion of a batch; Σ p and the Σ of squared mean places go to `shares` and `places`."""
        count, tokens, k = values.shape
        device, size = self.total.device, self.latents * count
        layer = torch.arange(count, device=device)[:, None, None]
        key = torch.where(values > 0, latents * count + layer, size).to(device)
        key, order = key.transpose(0, 1).reshape(tokens, count * k).sort(dim=1)  # by latent, then layer; what is off comes last
        found = key < size
        a = values.to(device, torch.float64).transpose(0, 1).reshape(tokens, count * k).gather(1, order)[found]
        token = torch.nonzero(found)[:, 0]
        key = key[found]
        latent, at = key // count, key % count
        begins = torch.ones(len(key), dtype=torch.bool, device=device)
        begins[1:] = (latent[1:] != latent[:-1]) | (token[1:] != token[:-1])
        pair = begins.cumsum(0) - 1
        whose = latent[begins]
        numbers = torch.tensor(self.layers, dtype=torch.float64, device=device)
        one = torch.ones_like(a)

        def by_pair(entries: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(whose), dtype=torch.float64, device=device).index_add_(0, pair, entries)

        strength = by_pair(a)
        p = a / strength[pair]
        mean, breadth = by_pair(p * numbers[at]), by_pair(one).long()
        again = ~begins[1:] & (at[1:] == at[:-1] + 1)
        self.active.view(-1).index_add_(0, key, one)
        self.total.view(-1).index_add_(0, key, a)
        self.squares.view(-1).index_add_(0, key, a.square())
        self.peak.view(-1).scatter_reduce_(0, key, a, "amax")
        self.mean_squares.index_add_(0, whose, mean.square())
        self.weighted_mean_squares.index_add_(0, whose, strength * mean.square())
        self.spread.view(-1).index_add_(0, whose * (count + 1) + breadth, one[: len(whose)])
        steps = (latent * (count - 1) + at)[:-1][again]
        self.stays.view(-1).index_add_(0, steps, one[: len(steps)])
        shares.view(-1).index_add_(0, key, p)
        places.index_add_(0, whose, by_pair(p * at).square())  # the authors number layers from 0 without gaps

    def merge(self, other: LayerStats) -> LayerStats:
        """The sums over both sets of tokens.

        Raises:
            MomentsError: The other is of other layers, or has another number of latents.
        """
        if (self.layers, self.latents) != (other.layers, other.latents):
            raise MomentsError(
                f"layer statistics of {other.latents} latents at layers {other.layers} do not fit {self.latents} at {self.layers}"
            )
        merged = LayerStats(self.layers, self.latents, self.total.device)
        merged.tokens = self.tokens + other.tokens
        for name, mine in self.tensors().items():
            theirs = getattr(other, name).to(mine.device)
            setattr(merged, name, torch.maximum(mine, theirs) if name == "peak" else mine + theirs)
        return merged

    def tensors(self) -> dict[str, torch.Tensor]:
        """All sums by name."""
        return {name: getattr(self, name) for name in (*_BY_LAYER, *_BY_LATENT, "spread", "stays", "published")}

    def take(self, tokens: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over stored sums.

        Raises:
            MomentsError: They do not fit.
        """
        _take(self.tensors(), tensors)
        if not isinstance(tokens, int) or tokens < 0:
            raise MomentsError(f"the stored number of tokens is {tokens!r}")
        self.tokens = tokens


def _published(q: torch.Tensor, squared_mean: torch.Tensor) -> torch.Tensor:
    """One batch of the authors' numbers, float64 (4,), from mean p, (latents, layers), and mean m², (latents,), over *all* tokens.

    p is taken for zero where a latent is inactive, so what they take for distributions does not sum to one.
    """
    layer = torch.arange(q.shape[1], dtype=torch.float64, device=q.device)
    second = q @ layer.square()
    pooled = q.mean(0)
    return torch.stack(
        [
            torch.ones_like(pooled[0]),
            (second - squared_mean).mean(),
            (second - (q @ layer).square()).mean(),
            pooled @ layer.square() - (pooled @ layer).square(),
        ]
    )


class Reconstruction:
    """Sums that give, layer by layer, how well residuals are reconstructed; additive.

    Attributes:
        n: Tokens.
        mean: Of the residuals, float64 (layers, d_model).
        power: Their squared deviations from it, by coordinate, float64 (layers, d_model).
        errors: Squared errors, float64 (layers,).
        active: Active latents, float64 (layers,).
        strength: Σ of activations, float64 (layers,).
    """

    def __init__(self, layers: int, d_model: int, device: torch.device | str = "cpu") -> None:
        self.n = 0
        self.mean, self.power = (torch.zeros(layers, d_model, dtype=torch.float64, device=device) for _ in range(2))
        self.errors, self.active, self.strength = (torch.zeros(layers, dtype=torch.float64, device=device) for _ in range(3))

    def add(self, x: torch.Tensor, error: torch.Tensor, values: torch.Tensor) -> None:
        """Add tokens: residuals and errors, float (layers, n, d_model), and activations, float (layers, n, k)."""
        if not x.shape[1]:
            return
        part = Reconstruction(self.mean.shape[0], self.mean.shape[1], self.mean.device)
        rows = x.double()
        part.n = rows.shape[1]
        part.mean = rows.mean(1)
        part.power = (rows - part.mean[:, None]).square().sum(1)
        part.errors = error.double().square().sum((1, 2))
        part.active = (values > 0).sum((1, 2)).double()
        part.strength = values.double().sum((1, 2))
        whole = self.merge(part)
        self.__dict__.update(whole.__dict__)

    def merge(self, other: Reconstruction) -> Reconstruction:
        """The sums over both sets of tokens (Chan's formula)."""
        whole = Reconstruction(self.mean.shape[0], self.mean.shape[1], self.mean.device)
        whole.n = self.n + other.n
        share = other.n / max(whole.n, 1)
        step = other.mean - self.mean
        whole.mean = self.mean + share * step
        whole.power = self.power + other.power + self.n * share * step.square()
        for name in ("errors", "active", "strength"):
            setattr(whole, name, getattr(self, name) + getattr(other, name))
        return whole

    @property
    def joint_power(self) -> torch.Tensor:
        """Squared deviations from the mean over tokens *and* coordinates, as the authors take them; float64 (layers,)."""
        return self.power.sum(1) + self.n * (self.mean - self.mean.mean(1, keepdim=True)).square().sum(1)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All sums by name."""
        return {name: getattr(self, name) for name in ("mean", "power", "errors", "active", "strength")}

    def take(self, tokens: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over stored sums.

        Raises:
            MomentsError: They do not fit.
        """
        _take(self.tensors(), tensors, "errors.")
        self.n = tokens


def _take(sums: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], prefix: str = "") -> None:
    """Put stored tensors into sums; `prefix` names whose they are.

    Raises:
        MomentsError: They do not fit.
    """
    for name, mine in sums.items():
        stored = tensors.get(name)
        if stored is None or stored.shape != mine.shape or stored.dtype != mine.dtype or not bool(torch.isfinite(stored).all()):
            raise MomentsError(f"the stored layer statistics lack {prefix}{name}, or it has another shape, or is not finite")
        mine.copy_(stored)


# ---- the variance of the layer -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerVariance:
    """How far the layer at which a latent is active varies.

    Attributes:
        total: Var(L).
        aggregated: E[Var(L|F)]: of one latent over all tokens.
        single: E[Var(L|F,T)]: of one latent at one token.
    """

    total: float
    aggregated: float
    single: float

    @property
    def ratio(self) -> float:
        """Aggregated over single: how much more a latent's layer varies over the text than at a token; NaN if it never varies at one."""
        return self.aggregated / self.single if self.single > 1e-12 * self.total else math.nan  # below lie rounding errors

    @property
    def share(self) -> float:
        """Aggregated over total: 0 if each latent keeps to a layer, 1 if the latent says nothing about the layer."""
        return self.aggregated / self.total if self.total > 0 else math.nan


def layer_variance(stats: LayerStats, weights: str = "activation") -> LayerVariance:
    """Decompose the variance of the layer by the law of total variance: Var(L) ≥ E[Var(L|F)] ≥ E[Var(L|F,T)] ≥ 0.

    Args:
        stats: The sums.
        weights: One of `WEIGHTS`. With `published`, the numbers of the authors' code, averaged over batches: they are no variances, do not
            obey that law, and change with the numbering of layers.

    Raises:
        MomentsError: The weights are unknown, or no latent was ever active.
    """
    if weights not in WEIGHTS:
        raise MomentsError(f"unknown weights {weights!r}; known are {', '.join(WEIGHTS)}")
    if not bool(stats.total.any()):
        raise MomentsError("no latent was active at any token: there is no layer to speak of")
    if weights == "published":
        batches, single, aggregated, total = stats.published.tolist()
        return LayerVariance(total / batches, aggregated / batches, single / batches)
    x, squares = (stats.total, stats.weighted_mean_squares) if weights == "activation" else (stats.shares, stats.mean_squares)
    numbers = torch.tensor(stats.layers, dtype=torch.float64, device=x.device)
    whole = x.sum()
    centre = float((x.sum(0) @ numbers) / whole)
    layer = numbers - centre  # the numbering does not matter; about its mean, no digits are lost
    by_latent = x.sum(1)
    mean = (x @ layer) / torch.where(by_latent > 0, by_latent, 1.0)
    second = x @ layer.square()
    # Σ w (m - c)² = Σ w m² - 2 c Σ w m + c² Σ w, and Σ w m = Σ_l l x.
    about = squares - 2 * centre * (x @ numbers) + centre**2 * by_latent
    return LayerVariance(
        float(second.sum() / whole),
        float((second - by_latent * mean.square()).clamp(min=0).sum() / whole),
        float((second - about).clamp(min=0).sum() / whole),
    )


def layer_variance_intervals(folds: Sequence[LayerStats], weights: str = "activation") -> dict[str, Interval]:
    """`total`, `aggregated`, `single`, `ratio` and `share` with 95 % intervals, by the jackknife over folds of documents.

    Args:
        folds: Sums of each fold.
        weights: One of `WEIGHTS`.

    Raises:
        MomentsError: As in `layer_variance`, or there is no fold.
    """
    names = ("total", "aggregated", "single", "ratio", "share")
    whole = layer_variance(merged(folds), weights)
    rest = [layer_variance(merged([fold for fold in folds if fold is not left]), weights) for left in folds if len(folds) > 1]
    found = {}
    for name in names:
        value, spread = getattr(whole, name), jackknife([getattr(one, name) for one in rest])
        found[name] = Interval(value) if spread is None else spread.around(value)
    return found


def merged(folds: Sequence[LayerStats]) -> LayerStats:
    """All sums together.

    Raises:
        MomentsError: There are none.
    """
    if not folds:
        raise MomentsError("there are no tokens in these folds: give more text")
    whole = folds[0]
    for fold in folds[1:]:
        whole = whole.merge(fold)
    return whole


# ---- one latent -------------------------------------------------------------------------------------------------------------


def layer_distributions(stats: LayerStats, at_least: int = 1) -> dict[str, torch.Tensor]:
    """What is known of each latent's layers; NaN for a latent that was never active.

    Args:
        stats: The sums.
        at_least: Tokens from which on a latent counts as active at a layer, for `layers`.

    Returns:
        float64 (latents,) each. `tokens` (at which it is active at some layer), `count` and `strength` (Σ over layers of `active` and
        `total`), `mean`, `std` (of the layer, by activation), `entropy` (nats), `bimodality` (Sarle's (skew² + 1) / kurtosis of the layer:
        1 for two points, 0.6 for a uniform spread; NaN if it keeps to one layer), `bimodality_published` (the same of the totals as
        numbers), `dip` (Hartigan's, of the distribution over layers: 0 for one peak, below 1/4; layers as read are neighbours), `layers`
        (at how many it is active), `single` (E[Var(L|F=f,T)], by activation), `breadth` (layers at a token, on average), `persistence`
        (P(active at the next layer | active), by tokens).
    """
    strength = stats.total.sum(1)
    p = stats.total / torch.where(strength > 0, strength, torch.nan)[:, None]
    numbers = torch.tensor(stats.layers, dtype=torch.float64, device=p.device)
    mean = p @ numbers
    about = numbers - mean[:, None]
    second, third, fourth = ((p * about**power).sum(1) for power in (2, 3, 4))
    entropy = -(torch.special.xlogy(p, p)).sum(1)
    tokens = stats.spread[:, 1:].sum(1)
    live = torch.where(tokens > 0, tokens, torch.nan)
    # Weighted squares of m, about the latent's mean layer; Var(L|F) less the variance of m is what is left at a token.
    spread_of_mean = stats.weighted_mean_squares / strength - mean.square()
    before = stats.active[:, :-1].sum(1)
    return {
        "tokens": tokens,
        "count": stats.active.sum(1),
        "strength": strength,
        "mean": mean,
        "std": second.sqrt(),
        "entropy": entropy,
        "bimodality": _sarle(second, third, fourth),
        "bimodality_published": _sarle(*_moments_of(stats.total)),
        "dip": dip(stats.total),
        "layers": torch.where(tokens > 0, (stats.active >= at_least).sum(1).double(), torch.nan),
        "single": (second - spread_of_mean).clamp(min=0),
        "breadth": stats.active.sum(1) / live,
        "persistence": stats.stays.sum(1) / torch.where(before > 0, before, torch.nan),
    }


@dataclass(frozen=True)
class Histogram:
    """Where a number of each latent lies.

    Attributes:
        edges: Of the bins, float64 (bins + 1,).
        density: Share of latents per unit, float64 (bins,); times the widths of the bins it adds up to one.
    """

    edges: torch.Tensor
    density: torch.Tensor


def mean_layer_histograms(stats: LayerStats, bins: int = 15) -> tuple[Histogram, Histogram]:
    """Histograms over the latents that were active: of the mean layer, and of how far it lies from a layer.

    A latent that keeps to one layer has distance 0, one that is equally active at two neighbouring ones 1/2.

    Args:
        stats: The sums.
        bins: For each layer; with an odd number, a latent that keeps to a layer lies in the middle of a bin, not at an edge.

    Returns:
        Of the mean layer, from half a layer before the first to half a layer behind the last; and of the distance of the mean from the
        nearest one of the layers read, in [0, 1/2], where layers as read count as one apart.

    Raises:
        MomentsError: No latent was ever active, or bins is not positive.
    """
    strength = stats.total.sum(1)
    if bins < 1 or not bool(strength.any()):
        raise MomentsError(f"a histogram with {bins} bins of {int((strength > 0).sum())} active latents: give at least one of each")
    p = (stats.total[strength > 0] / strength[strength > 0, None]).cpu()
    mean = p @ torch.tensor(stats.layers, dtype=torch.float64)
    place = p @ torch.arange(len(stats.layers), dtype=torch.float64)
    first, last = stats.layers[0], stats.layers[-1]
    found = _histogram(mean, first - 0.5, last + 0.5, bins * (last - first + 1))
    return found, _histogram((place - place.round()).abs(), 0.0, 0.5, bins)


def _histogram(values: torch.Tensor, low: float, high: float, bins: int) -> Histogram:
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    at = ((values - low) / (high - low) * bins).long().clamp(0, bins - 1)
    return Histogram(edges, torch.bincount(at, minlength=bins).double() / len(values) * bins / (high - low))


def _sarle(second: torch.Tensor, third: torch.Tensor, fourth: torch.Tensor) -> torch.Tensor:
    """(skew² + 1) / kurtosis from central moments."""
    varies = torch.where(second > 1e-12, second, torch.nan)
    return (third.square() / varies**3 + 1) / (fourth / varies.square())


def _moments_of(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Second to fourth central moment of each row, in units of its largest value."""
    scale = values.abs().amax(1, keepdim=True)
    scaled = values / torch.where(scale > 0, scale, torch.nan)
    about = scaled - scaled.mean(1, keepdim=True)
    return about.square().mean(1), (about**3).mean(1), (about**4).mean(1)
