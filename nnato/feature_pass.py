"""Scores of features where they are active, and of the activations themselves, from one pass over test documents (METHODS §6.2, §6.3)."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange

from nnato.active_scores import EXTRAS, ActiveScores, FeaturePass, area
from nnato.corpus import TokenBlocks
from nnato.dictionaries import Dictionary
from nnato.errors import DictionaryError, MomentsError
from nnato.features import check_latents
from nnato.models import describe
from nnato.operators import TransportOperator
from nnato.sites import ResidualSite
from nnato.statistics import Progress, ResidualBatch
from nnato.streaming import stream
from nnato.sums import PairSums, positive

if TYPE_CHECKING:
    from nnato.nnsight_setup import TransformersModel

CHUNK = 256
"""Tokens whose pre-activations are held at one time."""
BINS = 32
"""Bins of pre-activations on each side of the bar, for the area under the ROC curve."""
SAMPLED = 4096
"""How many tokens, by default, take part in what needs an encoding of every prediction: activations, and reconstructions."""
PAPER_ACTIVE = 1e-6
"""Activation from which the paper calls a feature active."""


class FeatureStatistic:
    """Sums over test tokens of features and their predictions by several operators, after `statistics.Statistic`: no token is kept.

    Attributes:
        sites: Sites whose residuals are captured, sorted.
        latents: Latents that are judged, int64 (features,).
    """

    def __init__(
        self,
        dictionary: Dictionary,
        operators: Sequence[TransportOperator],
        sites: Sequence[ResidualSite],
        latents: torch.Tensor,
        folds: int,
        paper: bool = False,
        sample: int = 1,
    ) -> None:
        self.dictionary, self.operators, self.latents, self.paper = dictionary, list(operators), latents, paper
        self.sample = sample
        self.sites = tuple(sites)
        self._target = self.sites.index(operators[0].target)
        every = len(latents) == dictionary.latents and bool((latents == torch.arange(len(latents))).all())
        self._chosen = None if every else latents
        # Relative errors of tiny numbers, which the paper's metrics average, need every digit.
        self._precision = torch.float64 if paper else torch.float32
        self._directions = dictionary.directions[latents].to(self._precision)
        self._centre = operators[0].target_mean.to(self._precision)
        shape, maps = (folds, len(latents)), len(self.operators)
        # Of all operators: n, Σa, Σa² of active tokens, and Σz, Σz² of sampled ones; of each: Σb, Σb², Σab, and Σẑ, Σẑ², Σzẑ.
        self._parts = {
            "active": torch.zeros(3 + 3 * maps, *shape, dtype=torch.float64),
            "latent": torch.zeros(2 + 3 * maps, *shape, dtype=torch.float64),
            "tokens": torch.zeros(2, folds, dtype=torch.float64),
            "fired": torch.zeros(1 + 2 * maps, len(latents), dtype=torch.float64),
            "histograms": torch.zeros(maps, 2, len(latents), 2 * BINS, dtype=torch.int32),
            "unexplained": torch.zeros(2, 1 + maps, dtype=torch.float64),
            "documents": torch.zeros(len(latents), dtype=torch.int64),
            "scale": torch.zeros(len(latents)),
            "extras": torch.zeros(1 + len(EXTRAS) * maps if paper else 0, len(latents), dtype=torch.float64),
        }

    def update(self, batch: ResidualBatch) -> None:
        """Add a batch of test documents; refused whole if any real token's residual is not finite."""
        batch.check_finite()
        device = batch.residuals.device
        if self._directions.device != device:
            self._directions, self._centre = self._directions.to(device), self._centre.to(device)
            self.dictionary = self.dictionary.to(device)
            self._parts = {name: part.to(device) for name, part in self._parts.items()}
        chosen = batch.ordinary
        documents = batch.documents[:, None].expand_as(chosen)[chosen]
        rows = {site: batch.residuals[place][chosen] for place, site in enumerate(self.sites)}
        seen = int(self._parts["tokens"][0].sum())
        for first in range(0, len(documents), CHUNK):
            self._add_active({site: one[first : first + CHUNK] for site, one in rows.items()}, documents[first : first + CHUNK], batch.fold)
        sampled = {site: one[(-seen) % self.sample :: self.sample] for site, one in rows.items()}
        for first in range(0, len(sampled[self.sites[self._target]]), CHUNK):
            self._add_activations({site: one[first : first + CHUNK] for site, one in sampled.items()}, batch.fold)

    def _add_active(self, residuals: Mapping[ResidualSite, torch.Tensor], documents: torch.Tensor, fold: int) -> None:
        """Sums over active tokens of a = d·y and b = d·ŷ about the training mean."""
        y, predicted = self._predictions(residuals)
        true = _Encoded.of(self.dictionary, self.dictionary.pre_activations(y), self._chosen)
        if not int(self._parts["tokens"][0].sum()):
            self._parts["scale"] = true.pre.std(0).clamp(min=1e-6)
        self._parts["tokens"][0, fold] += len(y)
        kept = true.values > PAPER_ACTIVE if self.paper else slice(None)
        rows, columns = true.rows[kept], true.columns[kept]
        vectors = torch.stack([y, *predicted], dim=1).to(self._precision) - self._centre
        numbers = _products(self._directions, vectors, rows, columns).double()
        a, b = numbers[0], numbers[1:]
        total = self._parts["active"][:, fold]
        terms = [torch.ones_like(a), a, a * a, *b, *(b * b), *(a * b)]
        for place, term in enumerate(terms):
            total[place] += self._by_feature(columns, term)
        active = self._parts["documents"]
        for document in set(documents.tolist()):
            mine = columns[documents[rows] == document]
            active[mine] |= 1 << (document % 63)
        if self.paper:
            raw = self._offsets()[columns]
            a, b = a + raw, b + raw
            sums = [a.abs(), *b.abs(), *(a - b).abs(), *((a - b) / a).abs(), *(b / a).abs().log().square()]
            for place, term in enumerate(sums):
                self._parts["extras"][place] += self._by_feature(columns, term)

    def _add_activations(self, residuals: Mapping[ResidualSite, torch.Tensor], fold: int) -> None:
        """Sums of activations z and ẑ, who fires when, and how well the dictionary reconstructs residuals and predictions."""
        y, predicted = self._predictions(residuals)
        maps, total, fired = len(predicted), self._parts["latent"][:, fold], self._parts["fired"]
        true = self._encoded(y, 0)
        features = torch.arange(len(self.latents), device=y.device)
        histograms = (true.fires() * len(features) + features) * (2 * BINS) - 1
        z = true.values.double()
        self._parts["tokens"][1, fold] += len(y)
        total[0] += self._by_feature(true.columns, z)
        total[1] += self._by_feature(true.columns, z * z)
        fired[0] += self._by_feature(true.columns, torch.ones_like(z))
        for number, one in enumerate(predicted):
            found = self._encoded(one, 1 + number)
            margins = found.margins(true.rows, true.columns)
            there = torch.where(margins > 0, found.magnitudes(true.rows, true.columns), 0.0).double()
            own = found.values.double()
            total[2 + number] += self._by_feature(found.columns, own)
            total[2 + maps + number] += self._by_feature(found.columns, own * own)
            total[2 + 2 * maps + number] += self._by_feature(true.columns, z * there)
            fired[1 + number] += self._by_feature(found.columns, torch.ones_like(own))
            fired[1 + maps + number] += self._by_feature(true.columns, (margins > 0).double())
            self._count(number, histograms, found.pre - found.bars)

    def _predictions(self, residuals: Mapping[ResidualSite, torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return residuals[self.sites[self._target]].float(), [one(residuals[one.source].float()) for one in self.operators]

    def _encoded(self, x: torch.Tensor, number: int) -> _Encoded:
        """Of the features that are judged; what all latents leave unexplained is added on the way."""
        pre = self.dictionary.pre_activations(x)
        every = _Encoded.of(self.dictionary, pre, None)
        starts = torch.searchsorted(every.rows, torch.arange(len(x), device=x.device))
        rebuilt = self.dictionary.decode_sparse(every.values, every.columns, x, starts)
        for place, deviations in enumerate([x - rebuilt, x - self._centre]):
            self._parts["unexplained"][place, number] += deviations.double().square().sum()
        return every if self._chosen is None else _Encoded.of(self.dictionary, pre, self._chosen)

    def _count(self, number: int, places: torch.Tensor, margins: torch.Tensor) -> None:
        """Add margins, (rows, features), to the histograms that begin at `places`, of tokens where a feature is silent or fires.

        There are 32 bins on each side of the bar, in units of the feature's own spread, open at both ends.
        """
        bins = margins.abs().add_(self._parts["scale"])
        bins = torch.div(margins, bins, out=bins).add_(1).mul_(BINS).ceil_().clamp_(min=1)  # a margin of 0 is below the bar
        found = bins.long().add_(places).flatten()
        histograms = self._parts["histograms"][number].view(-1)
        histograms.scatter_add_(0, found, torch.ones((), dtype=histograms.dtype, device=found.device).expand_as(found))

    def _by_feature(self, columns: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
        return torch.bincount(columns, terms, minlength=len(self.latents))

    def _offsets(self) -> torch.Tensor:
        """Training means of the numbers, float64 (features,)."""
        return self._directions.double() @ self._centre.double()

    # ---- storage -------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[Mapping[str, torch.Tensor], dict[str, Any]]:
        """All sums."""
        return dict(self._parts), {"features": len(self.latents)}

    def restore(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
        """Take over stored sums of the same features and operators.

        Raises:
            MomentsError: They do not fit.
        """
        like = {name: (part.shape, part.dtype) for name, part in self._parts.items()}
        if {name: (part.shape, part.dtype) for name, part in tensors.items()} != like:
            raise MomentsError("the stored sums are of other features or operators")
        self._parts = {name: part.to(self._centre.device).clone() for name, part in tensors.items()}

    def result(self) -> FeaturePass:
        """What follows from the sums so far."""
        parts = {name: part.cpu() for name, part in self._parts.items()}
        maps = len(self.operators)
        n, a, aa = parts["active"][:3]
        sampled = parts["tokens"][1]
        z, zz = parts["latent"][:2]
        scores = []
        for number, operator in enumerate(self.operators):
            b, bb, ab = (parts["active"][3 + number + step * maps] for step in range(3))
            own, square, cross = (parts["latent"][2 + number + step * maps] for step in range(3))
            predicted, hits = parts["fired"][1 + number], parts["fired"][1 + maps + number]
            unexplained, whole = parts["unexplained"][:, 1 + number]
            scores.append(
                ActiveScores(
                    operator=operator,
                    active=PairSums(n, a, b, aa, bb, ab),
                    latent=PairSums(sampled[:, None].expand_as(z), z, own, zz, square, cross),
                    precision=hits / positive(predicted),
                    recall=hits / positive(parts["fired"][0]),
                    auc=area(*parts["histograms"][number]),
                    unexplained=float(unexplained / whole),
                    extras={name: parts["extras"][1 + step * maps + number] for step, name in enumerate(EXTRAS) if self.paper},
                )
            )
        unexplained, whole = parts["unexplained"][:, 0]
        masks = parts["documents"]
        return FeaturePass(
            latents=self.latents.cpu(),
            mean=self._offsets().cpu(),
            tokens=int(parts["tokens"][0].sum()),
            sampled=int(sampled.sum()),
            fired=parts["fired"][0],
            active=n.sum(0),
            documents=sum(((masks >> bit) & 1 for bit in range(63)), torch.zeros_like(masks)),
            unexplained=float(unexplained / whole),
            scores=tuple(scores),
            absolute=parts["extras"][0] if self.paper else None,
        )


@dataclass(frozen=True)
class _Encoded:
    """Which features are active in some tokens, by pairs of token and feature, and all pre-activations."""

    dictionary: Dictionary
    latents: torch.Tensor | None
    pre: torch.Tensor
    bars: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor

    @staticmethod
    def of(dictionary: Dictionary, pre: torch.Tensor, latents: torch.Tensor | None) -> _Encoded:
        """From pre-activations of all latents."""
        bars = dictionary.bars(pre)
        if latents is not None:
            pre = pre[:, latents]
            bars = bars if bars.dim() == 2 else bars[latents]
        flat = _places(pre > bars)
        rows, columns = flat // pre.shape[1], flat % pre.shape[1]
        values = dictionary.magnitudes(pre.reshape(-1)[flat], columns if latents is None else latents[columns])
        return _Encoded(dictionary, latents, pre, bars, rows, columns, values)

    def margins(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """How far pre-activations lie above their bars at some pairs."""
        bars = self.bars[rows, 0] if self.bars.dim() == 2 else self.bars[columns]
        return self.pre[rows, columns] - bars

    def magnitudes(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """What activations at some pairs are, if they are active."""
        return self.dictionary.magnitudes(self.pre[rows, columns], columns if self.latents is None else self.latents[columns])

    def fires(self) -> torch.Tensor:
        """Whether features are active, bool (rows, features)."""
        return self.pre > self.bars


def feature_pass(
    model: TransformersModel,
    blocks: TokenBlocks,
    dictionary: Dictionary,
    operators: Sequence[TransportOperator],
    features: Sequence[int] | torch.Tensor | None = None,
    *,
    paper: bool = False,
    sample: int | None = None,
    split: str = "test",
    batch_size: int = 8,
    file: Path | None = None,
    progress: Progress | None = None,
) -> FeaturePass:
    """Judge operators where features are active, all of them in one pass over held-out documents.

    Args:
        model: The model the operators were fitted on.
        blocks: The text they were fitted on, tokenised.
        dictionary: A sparse autoencoder of the operators' target.
        operators: Operators with the same target, for example those of `evaluate_features`.
        features: Latents; all by default.
        paper: As in the paper: a feature is active above 1e-6, and the sums of all of its metrics are kept.
        sample: For scores of activations, every prediction of one token in so many is encoded; 1 for all, which costs most. By default
            so many that about 4,096 tokens are.
        split: Documents to read.
        batch_size: Token blocks per forward pass.
        file: Where to keep checkpoints.
        progress: Told of each batch.

    Raises:
        DictionaryError: It belongs to another model or site, or has no such latent; or the operators have several targets.
        ActivationError: A residual is not finite.
    """
    info, latents = describe(model), check_latents(dictionary, features)
    if len({operator.target for operator in operators}) != 1:
        raise DictionaryError("the operators of one pass need the same target: features belong to a site")
    dictionary.check_fits(info.fingerprint(), operators[0].target)
    medians: dict[ResidualSite, float] = {site: float("inf") for operator in operators for site in operator.pair}
    for operator in operators:  # the sites whose norms took part in the fits' token classes, so that the same tokens are sinks
        medians |= {ResidualSite.parse(site): float(median) for site, median in operator.details.get("medians", {}).items()}
    sites = tuple(sorted(medians))
    part = blocks.only(split)
    if sample is None:
        sample = max(1, round(int(part.index[:, 1].sum()) / SAMPLED))
    statistic = FeatureStatistic(dictionary, operators, sites, latents, blocks.fingerprint["folds"], paper, sample)
    request = {
        "model": info.contents(),
        "text": blocks.fingerprint["digest"],
        "split": split,
        "dictionary": dictionary.fingerprint()["digest"],
        "operators": [[operator.source.key, operator.target.key, operator.name, _digest(operator)] for operator in operators],
        "paper": paper,
        "latents": latents.tolist(),
        "sample": sample,
        "batch_size": batch_size,
    }
    frozen = torch.tensor([medians[site] for site in sites], dtype=torch.float64)
    stream(
        model,
        part,
        statistic,
        request,
        {},
        medians=frozen,
        file=file,
        kind="feature-pass",
        batch_size=batch_size,
        progress=progress,
    )
    return statistic.result()


def _digest(operator: TransportOperator) -> str:
    """A fingerprint of an operator's numbers: sums of another fit of the same pair are not taken up."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in (operator.weight, operator.source_mean, operator.target_mean):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _places(mask: torch.Tensor) -> torch.Tensor:
    """Flat places of what is true, int64."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))  # several times faster than torch's
    return mask.reshape(-1).nonzero().flatten()


def _products(directions: torch.Tensor, vectors: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Scalar products of a direction with all vectors of a token, for pairs of token and direction.

    Args:
        directions: Float (features, d).
        vectors: Of the same dtype (tokens, vectors, d).
        rows: int64 (pairs,), ascending.
        columns: int64 (pairs,).

    Returns:
        Of that dtype (vectors, pairs).
    """
    maps = vectors.shape[1]
    counts = torch.bincount(rows, minlength=len(vectors))
    starts = torch.cat([counts.new_zeros(1), counts.repeat_interleave(maps).cumsum(0)])
    # All vectors of a token follow one another, so that its directions are read from memory once.
    mine = torch.repeat_interleave(starts.diff())
    firsts = (counts.cumsum(0) - counts).repeat_interleave(maps)
    places = torch.arange(len(mine), device=rows.device) - starts[mine] + firsts[mine]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        wanted = torch.sparse_csr_tensor(
            starts, columns[places], vectors.new_zeros(len(places)), (len(starts) - 1, len(directions)), check_invariants=True
        )
    stacked = rearrange(vectors, "token map width -> (token map) width")
    products = torch.sparse.sampled_addmm(wanted, stacked, directions.T, beta=0.0).values()
    found = vectors.new_empty(maps, len(rows))
    found[mine % maps, places] = products
    return found
