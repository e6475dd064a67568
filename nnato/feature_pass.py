"""Scores of features where they are active, and of the activations themselves, from one pass over test documents (METHODS §6.2, §6.3)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

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
PROBES = 16
"""One token in so many takes part in what only needs a sample: inactive pre-activations for the AUC, and reconstructions."""
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
    ) -> None:
        self.dictionary, self.operators, self.latents, self.paper = dictionary, list(operators), latents, paper
        self.sites = tuple(sites)
        self._target = self.sites.index(operators[0].target)
        self._all = len(latents) == dictionary.latents and bool((latents == torch.arange(len(latents))).all())
        # Relative errors of tiny numbers, which the paper's metrics average, need every digit.
        self._precision = torch.float64 if paper else torch.float32
        self._directions = dictionary.directions[latents].to(self._precision)
        self._centre = operators[0].target_mean.to(self._precision)
        shape, maps = (folds, len(latents)), len(self.operators)
        # Of all operators: n, Σa, Σa² of active tokens, and Σz, Σz² of probed ones; of each: Σb, Σb², Σab, and Σẑ, Σẑ², Σzẑ.
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
        for first in range(0, len(documents), CHUNK):
            part = slice(first, first + CHUNK)
            self._add({site: residuals[part] for site, residuals in rows.items()}, documents[part], batch.fold)

    def _add(self, rows: Mapping[ResidualSite, torch.Tensor], documents: torch.Tensor, fold: int) -> None:
        y = rows[self.sites[self._target]].float()
        predicted = [one(rows[one.source].float()) for one in self.operators]
        seen = int(self._parts["tokens"][0].sum())
        self._parts["tokens"][0, fold] += len(y)
        true = _Encoded.of(self.dictionary, y, None if self._all else self.latents)
        if not seen:
            self._parts["scale"] = true.pre.std(0).clamp(min=1e-6)
        kept = true.values > PAPER_ACTIVE if self.paper else slice(None)
        self._add_active(y, predicted, true.rows[kept], true.columns[kept], documents, fold)
        self._add_latents(true, predicted, fold)
        probed = torch.arange(len(y), device=y.device)[(-seen) % PROBES :: PROBES]
        if len(probed):
            self._add_probes(y[probed], true.at(probed), [one[probed] for one in predicted])

    def _add_active(
        self,
        y: torch.Tensor,
        predicted: Sequence[torch.Tensor],
        rows: torch.Tensor,
        columns: torch.Tensor,
        documents: torch.Tensor,
        fold: int,
    ) -> None:
        """Sums over active tokens of a = d·y and b = d·ŷ about the training mean."""
        vectors = torch.stack([y, *predicted], dim=-1).to(self._precision) - self._centre[:, None]
        numbers = _products(self._directions, vectors, rows, columns).double().T
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

    def _add_latents(self, true: _Encoded, predicted: Sequence[torch.Tensor], fold: int) -> None:
        """Sums of activations z and ẑ over all tokens, and who fires when."""
        maps, total, fired = len(predicted), self._parts["latent"][:, fold], self._parts["fired"]
        z = true.values.double()
        total[0] += self._by_feature(true.columns, z)
        total[1] += self._by_feature(true.columns, z * z)
        fired[0] += self._by_feature(true.columns, torch.ones_like(z))
        for number, one in enumerate(predicted):
            found = _Encoded.of(self.dictionary, one, None if self._all else self.latents)
            margins = found.margins(true.rows, true.columns)
            there = torch.where(margins > 0, found.magnitudes(true.rows, true.columns), 0.0).double()
            own = found.values.double()
            total[2 + number] += self._by_feature(found.columns, own)
            total[2 + maps + number] += self._by_feature(found.columns, own * own)
            total[2 + 2 * maps + number] += self._by_feature(true.columns, z * there)
            fired[1 + number] += self._by_feature(found.columns, torch.ones_like(own))
            fired[1 + maps + number] += self._by_feature(true.columns, (margins > 0).double())
            self._count(number, 1, true.columns, margins)

    def _add_probes(self, y: torch.Tensor, true: torch.Tensor, predicted: Sequence[torch.Tensor]) -> None:
        """Pre-activations where features are inactive, and how well the dictionary reconstructs residuals and predictions."""
        latents = None if self._all else self.latents
        unexplained = self._parts["unexplained"]
        for number, one in enumerate([y, *predicted]):
            rebuilt = self.dictionary.decode(self.dictionary.encode(one), one)
            unexplained[0, number] += (one - rebuilt).double().square().sum()
            unexplained[1, number] += (one - self._centre).double().square().sum()
        rows, columns = torch.nonzero(~true, as_tuple=True)
        for number, one in enumerate(predicted):
            found = _Encoded.of(self.dictionary, one, latents)
            self._count(number, 0, columns, found.margins(rows, columns))

    def _count(self, number: int, side: int, columns: torch.Tensor, margins: torch.Tensor) -> None:
        """Add margins to a histogram: 32 bins on each side of the bar, in units of the feature's own spread, open at both ends."""
        size = margins.abs()
        bins = (BINS * size / (size + self._parts["scale"][columns])).long().clamp(max=BINS - 1)
        place = columns * (2 * BINS) + torch.where(margins > 0, BINS + bins, BINS - 1 - bins)
        counts = torch.bincount(place, minlength=len(self.latents) * 2 * BINS)
        self._parts["histograms"][number, side] += counts.view(-1, 2 * BINS).int()

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
        count = parts["tokens"][0][:, None].expand_as(a)
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
                    latent=PairSums(count, z, own, zz, square, cross),
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
            tokens=int(count.sum(0)[0]),
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
    def of(dictionary: Dictionary, x: torch.Tensor, latents: torch.Tensor | None) -> _Encoded:
        every = dictionary.kind == "topk" or latents is None  # in a topk dictionary all latents compete
        pre = dictionary.pre_activations(x, None if every else latents)
        bars = dictionary.bars(pre)
        if latents is not None:
            pre = pre[:, latents] if every else pre
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

    def at(self, rows: torch.Tensor) -> torch.Tensor:
        """Whether features are active in some tokens, bool (rows, features)."""
        return self.pre[rows] > (self.bars[rows] if self.bars.dim() == 2 else self.bars)


def feature_pass(
    model: TransformersModel,
    blocks: TokenBlocks,
    dictionary: Dictionary,
    operators: Sequence[TransportOperator],
    features: Sequence[int] | torch.Tensor | None = None,
    *,
    paper: bool = False,
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
    statistic = FeatureStatistic(dictionary, operators, sites, latents, blocks.fingerprint["folds"], paper)
    request = {
        "model": info.contents(),
        "text": blocks.fingerprint["digest"],
        "split": split,
        "dictionary": dictionary.fingerprint()["digest"],
        "operators": [[operator.source.key, operator.target.key, operator.name, _digest(operator)] for operator in operators],
        "paper": paper,
        "latents": latents.tolist(),
        "batch_size": batch_size,
    }
    frozen = torch.tensor([medians[site] for site in sites], dtype=torch.float64)
    stream(
        model,
        blocks.only(split),
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
        vectors: Of the same dtype (tokens, d, vectors).
        rows: int64 (pairs,), ascending.
        columns: int64 (pairs,).

    Returns:
        Of that dtype (pairs, vectors).
    """
    found = [directions.new_zeros(0, vectors.shape[-1])]
    counts = torch.bincount(rows, minlength=len(vectors))
    ends = counts.cumsum(0).tolist()
    for first in range(0, len(vectors), 32):
        last = min(first + 32, len(vectors))
        most = int(counts[first:last].max())
        there = torch.arange(most, device=rows.device) < counts[first:last, None]
        padded = torch.zeros(last - first, most, dtype=torch.int64, device=rows.device)
        padded[there] = columns[(ends[first - 1] if first else 0) : ends[last - 1]]
        found.append(torch.bmm(directions[padded], vectors[first:last])[there])
    return torch.cat(found)
