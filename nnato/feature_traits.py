"""What latents are like, by the tokens at which they are active: rate, coherence, redundancy, vocabulary focus (METHODS §6.5).

Two statistics: `ActiveTokens` takes each latent as its SAE does, `PublishedTraits` repeats what the paper's code computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import sparse

from nnato.active_scores import FEWEST_DOCUMENTS, FEWEST_TOKENS
from nnato.corpus import TokenBlocks
from nnato.dictionaries import Dictionary
from nnato.errors import MomentsError
from nnato.models import ModelInfo
from nnato.sites import ResidualSite
from nnato.statistics import Progress, ResidualBatch
from nnato.streaming import stream

if TYPE_CHECKING:
    from nnato.nnsight_setup import TransformersModel

CHUNK = 256
"""Tokens encoded at one time."""
CELLS = 1 << 23
"""Correlations of latents, or logits of directions, held at one time."""
SAMPLED_LATENTS, SAMPLED_POSITIONS, LARGEST = 512, 2048, 32
"""Of the paper's code: latents that redundancy is measured against, positions drawn from a sequence, and values of these that count."""


@dataclass(frozen=True)
class Traits:
    """Traits of all latents of a dictionary, float64 (latents,) each; NaN where there is too little to tell.

    Attributes:
        rate: Share of tokens in which a latent is active.
        coherence: Minus the entropy, in nats, of the tokens at which it is active.
        redundancy: Its largest correlation with another latent.
        tokens: Tokens seen.
    """

    rate: torch.Tensor
    coherence: torch.Tensor
    redundancy: torch.Tensor
    tokens: int


class ActiveTokens:
    """Which latents are active at which tokens of one site, after `statistics.Statistic`.

    Kept are 16 bytes for each latent active at a token, and 16 for each token: about 0.5 GB for a million tokens with 32 active latents.

    Attributes:
        sites: The site.
    """

    def __init__(self, dictionary: Dictionary, site: ResidualSite) -> None:
        self.dictionary = dictionary
        self.sites: tuple[ResidualSite, ...] = (site,)
        self._tokens = 0
        self._parts: list[dict[str, torch.Tensor]] = []

    def update(self, batch: ResidualBatch) -> None:
        """Add a batch; refused whole if any real token's residual is not finite, or nobody knows the tokens."""
        batch.check_finite()
        ordinary = batch.ordinary.cpu()
        ids = _ids(batch)[ordinary]
        documents = batch.documents.cpu()[:, None].expand_as(ordinary)[ordinary]
        rows, columns, values = [], [], []
        encoded = torch.split(batch.residuals[0][batch.ordinary], CHUNK)
        for number, part in enumerate(encoded):
            activations = self.dictionary.encode(part).cpu()
            row, column = torch.nonzero(activations, as_tuple=True)
            rows.append(row + (self._tokens + number * CHUNK))
            columns.append(column)
            values.append(activations[row, column])
        if encoded and len(ids):
            found = {"rows": torch.cat(rows), "latents": torch.cat(columns).int(), "values": torch.cat(values)}
            self._parts.append(found | {"ids": ids, "documents": documents})
        self._tokens += len(ids)

    def state(self) -> tuple[Mapping[str, torch.Tensor], dict[str, Any]]:
        """All that was kept."""
        if len(self._parts) > 1:
            self._parts = [{name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}]
        return dict(self._parts[0]) if self._parts else {}, {"latents": self.dictionary.latents, "tokens": self._tokens}

    def restore(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
        """Take over what was kept of the same dictionary.

        Raises:
            MomentsError: It is of another one.
        """
        if metadata.get("latents") != self.dictionary.latents:
            raise MomentsError("the stored activations are of another dictionary")
        self._parts, self._tokens = [dict(tensors)] if tensors else [], metadata["tokens"]

    def rates(self) -> torch.Tensor:
        """Share of the tokens so far in which each latent is active, float64 (latents,)."""
        latents = self.state()[0].get("latents", torch.zeros(0, dtype=torch.int64))
        return torch.bincount(latents, minlength=self.dictionary.latents).double() / max(self._tokens, 1)

    def result(self) -> Traits:
        """Traits of the tokens so far.

        Raises:
            MomentsError: There are none, or no latent was ever active.
        """
        kept = {name: tensor.numpy() for name, tensor in self.state()[0].items()}
        if not kept or not len(kept["rows"]):
            raise MomentsError("no latent is active at any token: is this the dictionary's site?")
        latents, size = kept["latents"].astype(np.int64), self.dictionary.latents
        active = np.bincount(latents, minlength=size)
        documents = np.unique(kept["documents"], return_inverse=True)[1].reshape(-1)[kept["rows"]]
        in_documents = np.bincount(np.unique(latents * (documents.max() + 1) + documents) // (documents.max() + 1), minlength=size)
        entropies = entropy_of_counts(*count_pairs(latents, kept["ids"][kept["rows"]]), size)
        entropies[(active < FEWEST_TOKENS) | (in_documents < FEWEST_DOCUMENTS)] = np.nan
        matrix = sparse.csc_matrix((kept["values"].astype(np.float64), (kept["rows"], latents)), shape=(self._tokens, size))
        return Traits(
            rate=self.rates(),
            coherence=torch.from_numpy(-entropies),
            redundancy=torch.from_numpy(largest_correlations(matrix)),
            tokens=self._tokens,
        )


class PublishedTraits:
    """What the paper's code computes for its selection, with its flaws: thresholds are ignored, and zeros counted as activity.

    Of each sequence at most 2,048 positions are drawn with replacement; of those, each latent's 32 largest activations (or zeros) say which
    tokens it is active at. Redundancy is the largest absolute mean product with one of 512 latents, itself among them, in units of
    deviations about the mean, without taking the means off. All real tokens take part, the first one included.

    Attributes:
        sites: The site.
    """

    def __init__(self, dictionary: Dictionary, site: ResidualSite, seed: int = 0) -> None:
        self.dictionary, self.seed = dictionary, seed
        self.sites: tuple[ResidualSite, ...] = (site,)
        latents = dictionary.latents
        chosen = np.random.default_rng(0).choice(latents, size=min(SAMPLED_LATENTS, latents), replace=False)
        self._chosen = torch.from_numpy(np.sort(chosen))
        self._fired = torch.zeros(latents, dtype=torch.float64)
        self._products = torch.zeros(len(chosen), latents, dtype=torch.float64)
        self._keys, self._counts = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        self._tokens = self._sequences = 0

    def update(self, batch: ResidualBatch) -> None:
        """Add a batch; refused whole if any real token's residual is not finite, or nobody knows the tokens."""
        batch.check_finite()
        real, ids = (batch.ordinary | batch.excluded).cpu(), _ids(batch)
        keys = [
            self._add(batch.residuals[0][number][real[number].to(batch.residuals.device)], ids[number][real[number]])
            for number in range(len(real))
        ]
        new, counts = np.unique(np.concatenate(keys), return_counts=True)
        self._keys, where = np.unique(np.concatenate([self._keys, new]), return_inverse=True)
        weights = np.concatenate([self._counts, counts])
        self._counts = np.bincount(where.reshape(-1), weights, minlength=len(self._keys)).astype(np.int64)

    def _add(self, rows: torch.Tensor, ids: torch.Tensor) -> np.ndarray:
        """One sequence; which latents met which tokens, as int64 (n,) keys."""
        z = self.dictionary.pre_activations(rows).relu().cpu()
        self._fired += (z > 0).sum(0)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self._sequences)
        drawn = torch.randint(0, len(z), (min(SAMPLED_POSITIONS, len(z)),), generator=generator)
        some = z[drawn]
        places = some.T.contiguous().topk(min(LARGEST, len(some)), dim=1).indices
        latents = torch.arange(some.shape[1])[:, None]
        keys: np.ndarray = (latents << 32 | ids[drawn][places]).flatten().numpy()
        scaled = some / (some.std(dim=0, keepdim=True) + 1e-6)
        self._products += (scaled[:, self._chosen].T @ scaled).double() / len(some)
        self._tokens += len(z)
        self._sequences += 1
        return keys

    def state(self) -> tuple[Mapping[str, torch.Tensor], dict[str, Any]]:
        """All sums."""
        tensors = {"fired": self._fired, "products": self._products}
        tensors |= {"keys": torch.from_numpy(self._keys), "counts": torch.from_numpy(self._counts)}
        return tensors, {"latents": self.dictionary.latents, "tokens": self._tokens, "sequences": self._sequences, "seed": self.seed}

    def restore(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
        """Take over sums of the same dictionary.

        Raises:
            MomentsError: They are of another one.
        """
        if (metadata.get("latents"), metadata.get("seed")) != (self.dictionary.latents, self.seed):
            raise MomentsError("the stored sums are of another dictionary or seed")
        self._fired, self._products = tensors["fired"].clone(), tensors["products"].clone()
        self._keys, self._counts = tensors["keys"].numpy(), tensors["counts"].numpy()
        self._tokens, self._sequences = metadata["tokens"], metadata["sequences"]

    def result(self) -> Traits:
        """Traits of the tokens so far.

        Raises:
            MomentsError: There are none.
        """
        if not self._sequences:
            raise MomentsError("there are no tokens to select latents by")
        latents = self.dictionary.latents
        shares = self._counts / np.bincount(self._keys >> 32, self._counts, minlength=latents)[self._keys >> 32]
        entropy = np.bincount(self._keys >> 32, -shares * np.log(shares + 1e-12), minlength=latents)
        return Traits(
            rate=self._fired / self._tokens,
            coherence=torch.from_numpy(-entropy),
            redundancy=(self._products / self._sequences).abs().amax(0).clamp(0, 1),
            tokens=self._tokens,
        )


def read_tokens(
    model: TransformersModel,
    info: ModelInfo,
    blocks: TokenBlocks,
    statistic: ActiveTokens | PublishedTraits,
    kind: str,
    *,
    split: str,
    extra: Mapping[str, Any] | None = None,
    batch_size: int = 8,
    file: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Feed one split of a text to one of the two.

    Args:
        model: The model.
        info: What `describe` says of it.
        blocks: The text, tokenised.
        statistic: What to feed.
        kind: What a file of checkpoints holds.
        split: Which documents.
        extra: What else tells the run from others, in JSON.
        batch_size: Token blocks per forward pass.
        file: Where to keep checkpoints.
        progress: Told of each batch.

    Returns:
        What `stream` does.
    """
    request = {
        "model": info.contents(),
        "text": blocks.fingerprint["digest"],
        "split": split,
        "site": statistic.sites[0].key,
        "dictionary": statistic.dictionary.fingerprint()["digest"],
        **(extra or {}),
        "batch_size": batch_size,
    }
    return stream(model, blocks.only(split), statistic, request, {}, file=file, kind=kind, batch_size=batch_size, progress=progress)


def count_pairs(latents: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How often each latent meets each token: int64 (pairs,) latents and counts, of those that meet, from int64 (n,) latents and tokens."""
    keys, counts = np.unique(latents << 32 | ids, return_counts=True)
    return keys >> 32, counts


def entropy_of_counts(owners: np.ndarray, counts: np.ndarray, size: int) -> np.ndarray:
    """Entropy of a distribution per owner, corrected for kinds that were not seen, in nats (Chao & Shen 2003).

    The plain entropy of n draws is at most log n, so that rare latents would look coherent. Here the share of what was not seen is
    estimated by that of kinds seen once, and each kind is weighted by the chance of being seen.

    Args:
        owners: int64 (kinds,), ascending or not.
        counts: int64 (kinds,), positive.
        size: Number of owners.

    Returns:
        float64 (size,), NaN for owners without any.
    """
    n = np.bincount(owners, counts, minlength=size)
    once = np.bincount(owners, counts == 1, minlength=size)
    once = np.where(once == n, n - 1, once)  # else nothing at all would count as seen
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = ((1 - once / n) / n)[owners] * counts
        seen = -np.expm1(n[owners] * np.log1p(-np.minimum(shares, 1)))
        terms = np.where(shares > 0, -shares * np.log(shares) / seen, 0.0)
    found: np.ndarray = np.bincount(owners, terms, minlength=size)
    return np.where(n > 1, found, np.where(n == 1, 0.0, np.nan))


def largest_correlations(matrix: sparse.csc_matrix) -> np.ndarray:
    """The largest correlation of each column with another one, about the means, by products of blocks of columns.

    Args:
        matrix: Sparse float64 (rows, columns).

    Returns:
        float64 (columns,), NaN for a column that does not vary.
    """
    rows, columns = matrix.shape
    mean = np.asarray(matrix.mean(axis=0)).reshape(-1)
    square = np.asarray(matrix.multiply(matrix).mean(axis=0)).reshape(-1)
    spread = np.sqrt(np.maximum(square - mean**2, 0))
    varies = spread > 1e-9 * np.sqrt(square)
    scale = np.where(varies, spread, np.nan)
    found = np.full(columns, np.nan)
    step = max(1, CELLS // max(columns, 1))
    for first in range(0, columns, step):
        part = slice(first, min(first + step, columns))
        block = (matrix[:, part].T @ matrix).toarray() / rows - np.outer(mean[part], mean)
        block /= np.outer(scale[part], scale)
        block[np.arange(len(block)), np.arange(first, first + len(block))] = np.nan
        others = ~np.isnan(block).all(1)
        found[part][others] = np.nanmax(block[others], axis=1)
    return found


def vocabulary_focus(directions: torch.Tensor, unembedding: torch.Tensor) -> torch.Tensor:
    """How far the largest logit of a direction lies above the others: `(max - mean) / deviation` of `d_f W_U` over the vocabulary.

    Args:
        directions: Float (directions, d_model).
        unembedding: Float (vocabulary, d_model), the weights of the language-model head.

    Returns:
        float64 (directions,), NaN for a direction of zeros.
    """
    found = []
    weights = unembedding.detach().float()
    for part in torch.split(directions.float().to(weights.device), max(1, CELLS // len(weights))):
        logits = part @ weights.T
        spread, mean = torch.std_mean(logits, dim=1, correction=0)
        found.append((logits.amax(1) - mean) / torch.where(spread > 0, spread, float("nan")))
    return torch.cat(found).double().cpu()


def _ids(batch: ResidualBatch) -> torch.Tensor:
    if batch.ids is None:
        raise MomentsError("these residuals come without their tokens: latents are selected by tokens")
    return batch.ids.cpu()
