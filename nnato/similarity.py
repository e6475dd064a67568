"""How alike things are: residuals of adjacent layers, dictionaries, and latents and tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nnato.accumulation import tokenize
from nnato.corpus import Corpus, TokenBlocks
from nnato.dictionaries import Dictionary
from nnato.errors import DictionaryError, MomentsError
from nnato.intervals import Interval, ratio_spread
from nnato.lens import Lens
from nnato.models import describe
from nnato.reduction import TokenClasses, capture
from nnato.sites import Pair, ResidualSite
from nnato.statistics import Progress

if TYPE_CHECKING:
    from nnato.nnsight_setup import TransformersModel

CELLS = 1 << 24
"""Cosines held at once."""


# ---- residuals ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerCosine:
    """Cosine similarity of a token's residuals at two layers, each about its mean.

    Attributes:
        pair: The layers.
        mean: Mean over tokens, with a 95 % interval over documents' folds.
        std: Standard deviation over tokens.
    """

    pair: Pair
    mean: Interval
    std: float


def layer_cosines(
    model: TransformersModel,
    sites: Sequence[ResidualSite],
    corpus: Corpus | TokenBlocks,
    *,
    lens: Lens | None = None,
    split: str = "test",
    batch_size: int = 8,
    progress: Progress | None = None,
) -> list[LayerCosine]:
    """Centred cosine similarities of adjacent layers, in two passes over the text: means, then cosines.

    Args:
        model: The model.
        sites: The layers, at least two.
        corpus: The text, tokenised already or not.
        lens: Carries residuals to the last layer first.
        split: Which documents.
        batch_size: Token blocks per forward pass.
        progress: Told of batches done.

    Raises:
        MomentsError: There are fewer than two layers.
    """
    if len(sites) < 2:
        raise MomentsError("similarities of adjacent layers need two layers")
    info = describe(model)
    blocks = tokenize(model, corpus, progress).only(split)
    plan = blocks.plan(batch_size)
    total = torch.zeros(len(sites), info.d_model, dtype=torch.float64)
    count, medians = 0, None
    sums: dict[int, torch.Tensor] = {}
    for stage in ("means of layers", "similarities of layers"):
        classes = TokenClasses(medians)
        for number, rows in enumerate(plan):
            if progress is not None:
                progress(stage, number, len(plan))
            tokens = blocks.batch(rows)
            residuals = capture(model, tokens.ids, sites)
            x = residuals[:, classes.ordinary(tokens.ids, tokens.mask, tokens.special, residuals)]
            x = (x if lens is None else lens.to_shared(x.float(), sites)).double().cpu()
            if stage == "means of layers":
                total, count = total + x.sum(1), count + x.shape[1]
                continue
            centred = x - (total / count)[:, None]
            cosines = torch.nn.functional.cosine_similarity(centred[:-1], centred[1:], dim=-1)
            parts = torch.stack([torch.full_like(cosines[:, 0], cosines.shape[1]), cosines.sum(1), cosines.square().sum(1)])
            sums[tokens.fold] = sums.get(tokens.fold, 0) + parts
        medians = classes.medians
        if progress is not None:
            progress(stage, len(plan), len(plan))
    folds = torch.stack(list(sums.values()))
    found = []
    for number, pair in enumerate(itertools.pairwise(sites)):
        n, first, second = folds[:, :, number].T
        mean, spread = float(first.sum() / n.sum()), ratio_spread(first, n)
        std = math.sqrt(max(float(second.sum() / n.sum()) - mean**2, 0.0))
        found.append(LayerCosine(pair, Interval(mean) if spread is None else spread.around(mean), std))
    return found


# ---- dictionaries ------------------------------------------------------------------------------------------------------------


def max_cosines(directions: torch.Tensor, others: torch.Tensor | None = None) -> torch.Tensor:
    """Of each direction the largest cosine with any other one; their mean is MMCS.

    Args:
        directions: Float (n, d_model).
        others: Those to compare with, float (m, d_model); by default the same ones, each without itself.

    Returns:
        float64 (n,); NaN for a direction of zeros.

    Raises:
        DictionaryError: There is nothing to compare with.
    """
    rows = _unit(directions)
    columns = rows if others is None else _unit(others)
    if len(columns) < 1 + (others is None):
        raise DictionaryError("there is no other direction to compare with")
    found = []
    for part in torch.split(torch.arange(len(rows)), max(CELLS // len(columns), 1)):
        cosines = rows[part] @ columns.T
        if others is None:
            cosines[torch.arange(len(part)), part] = -math.inf
        found.append(torch.where(cosines.isnan(), -math.inf, cosines).amax(1))
    best = torch.cat(found)
    return torch.where(rows[:, 0].isnan() | best.isinf(), math.nan, best)


def cosine_histogram(directions: torch.Tensor, bins: int = 100) -> torch.Tensor:
    """Counts of the cosines of all pairs of directions, float (n, d_model), in bins of [-1, 1]; int64 (bins,)."""
    rows = _unit(directions)
    counts = torch.zeros(bins, dtype=torch.int64)
    for part in torch.split(torch.arange(len(rows)), max(CELLS // len(rows), 1)):
        cosines = rows[part] @ rows.T
        later = torch.arange(len(rows)) > part[:, None]
        counts += _binned(cosines[later], -1.0, 1.0, bins)
    return counts


def distance_histogram(layers: torch.Tensor, directions: torch.Tensor, cosine_bins: int = 64, layer_bins: int = 64) -> torch.Tensor:
    """Counts of pairs of latents by the distance of their mean layers and the cosine of their directions.

    Args:
        layers: Mean layer of each latent, float64 (n,); NaN leaves a latent out.
        directions: Float (n, d_model).
        cosine_bins: Of [-1, 1].
        layer_bins: Of [0, the largest distance].

    Returns:
        int64 (layer bins, cosine bins).
    """
    live = ~layers.isnan()
    mean, rows = layers[live], _unit(directions)[live]
    reach = float(mean.max() - mean.min()) or 1.0
    counts = torch.zeros(layer_bins * cosine_bins, dtype=torch.int64)
    for part in torch.split(torch.arange(len(rows)), max(CELLS // len(rows), 1)):
        later = torch.arange(len(rows)) > part[:, None]
        apart = (mean[part, None] - mean).abs()[later]
        cosines = (rows[part] @ rows.T)[later]
        place = (apart / reach * layer_bins).long().clamp(max=layer_bins - 1) * cosine_bins
        place += ((cosines + 1) / 2 * cosine_bins).long().clamp(0, cosine_bins - 1)
        counts += torch.bincount(place, minlength=len(counts))
    return counts.view(layer_bins, cosine_bins)


def _binned(values: torch.Tensor, low: float, high: float, bins: int) -> torch.Tensor:
    place = ((values[~values.isnan()] - low) / (high - low) * bins).long().clamp(0, bins - 1)
    return torch.bincount(place, minlength=bins)


def _unit(directions: torch.Tensor) -> torch.Tensor:
    rows = directions.double()
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / torch.where(norms > 0, norms, math.nan)


# ---- tokens ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenMatches:
    """The tokens whose vectors are most like the directions of some latents.

    Attributes:
        tokens: int64 (latents, count), best first.
        cosines: float64 (latents, count).
    """

    tokens: torch.Tensor
    cosines: torch.Tensor

    def to_json(self, tokenizer: Any, latent: int) -> list[dict[str, Any]]:
        """The matches of one latent, as text."""
        pairs = zip(self.tokens[latent].tolist(), self.cosines[latent].tolist(), strict=True)
        return [{"token": tokenizer.decode([token]), "cosine": cosine} for token, cosine in pairs]


def token_matches(
    model: TransformersModel, dictionary: Dictionary, latents: Sequence[int] | None = None, count: int = 8
) -> dict[str, TokenMatches]:
    """The tokens that latents are most like, by `embedding` and by `unembedding`.

    Args:
        model: The model.
        dictionary: The dictionary.
        latents: Which; all by default.
        count: Tokens for each.

    Raises:
        DictionaryError: It is of another width, or has no such latent.
    """
    chosen = torch.arange(dictionary.latents) if latents is None else torch.tensor(list(latents), dtype=torch.int64)
    if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < dictionary.latents:
        raise DictionaryError(f"latents run from 0 to {dictionary.latents - 1}: {int(chosen.max())} is not one of them")
    dictionary.check_fits(describe(model).fingerprint(), dictionary.sites[0] if dictionary.sites else ResidualSite(0))
    found = {}
    modules = {"embedding": model._module.get_input_embeddings(), "unembedding": model._module.get_output_embeddings()}
    rows = torch.nn.functional.normalize(dictionary.W_dec[chosen].float(), dim=1)
    for name, module in modules.items():
        table = torch.nn.functional.normalize(module.weight.detach().float().cpu(), dim=1)
        best = [(part @ table.T).topk(min(count, len(table)), dim=1) for part in torch.split(rows, max(CELLS // len(table), 1))]
        found[name] = TokenMatches(torch.cat([one.indices for one in best]), torch.cat([one.values for one in best]).double())
    return found
