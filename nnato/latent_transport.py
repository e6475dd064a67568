"""Is a latent that stays on the same as one that is transported? Activity over layers beside what a transport operator predicts of it.

For a pair of layers and each latent f there are two numbers: how often f is active at the second layer where it is active at the first
(persistence), and how well its activation at the second follows from the transported residual of the first (R²). Both depend on how often
f is active at all, so their rank correlation over latents is also given with that held fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from scipy import stats

from nnato.accumulation import tokenize
from nnato.coding import CELLS
from nnato.corpus import Corpus, TokenBlocks
from nnato.errors import MomentsError
from nnato.intervals import Interval, jackknife
from nnato.models import describe
from nnato.multilayer import MultiLayerSAE
from nnato.operators import TransportOperator
from nnato.reduction import TokenClasses, capture
from nnato.sites import Pair
from nnato.statistics import Progress

if TYPE_CHECKING:
    from nnato.nnsight_setup import TransformersModel

_SUMS = ("first", "second", "both", "value", "square", "error", "change")
"""By latent: tokens at which it is active at the first layer, the second, both; Σ y, Σ y², Σ (y - ŷ)² and Σ (y - x)² of its activations."""


@dataclass(frozen=True)
class Coincidence:
    """Whether latents that stay on are those that are transported, for one pair of layers.

    Attributes:
        pair: The layers.
        latents: How many latents are active often enough.
        persistence: Mean over them of P(active at the second layer | active at the first).
        r2: Median over them of the R² of their activation, predicted by the operator.
        r2_unmoved: The same, if the residual of the first layer is taken as it is.
        correlation: Spearman's, of persistence and R², with a 95 % interval over folds of documents.
        partial: The same with the rank of the latent's frequency held fixed.
        thirds: Median R² of the third of latents that stay on least, of the middle one, and of the third that stays on most.
    """

    pair: Pair
    latents: int
    persistence: float
    r2: float
    r2_unmoved: float
    correlation: Interval
    partial: Interval
    thirds: tuple[float, float, float]

    def to_json(self) -> dict[str, Any]:
        """As in `--json`."""
        return {
            "source": self.pair[0].key,
            "target": self.pair[1].key,
            **{name: getattr(self, name) for name in ("latents", "persistence", "r2", "r2_unmoved")},
            "correlation": self.correlation.to_json(),
            "partial": self.partial.to_json(),
            "thirds": list(self.thirds),
        }


@dataclass(frozen=True)
class LatentTransport:
    """Sums of some pairs of layers, by fold of documents.

    Attributes:
        pairs: The pairs.
        tokens: Tokens by fold.
        sums: float64 (folds, pairs, latents, sums), in the order of `_SUMS`.
    """

    pairs: tuple[Pair, ...]
    tokens: tuple[int, ...]
    sums: torch.Tensor = field(repr=False)

    def table(self, pair: Pair, without: int | None = None) -> dict[str, torch.Tensor]:
        """What is known of each latent at a pair of layers.

        Args:
            pair: The pair.
            without: Leave out this fold.

        Returns:
            float64 (latents,) each. `active` (tokens at the first layer), `frequency` (share of tokens at the second), `persistence`, `r2`,
            `r2_unmoved`; NaN where a latent is never active.
        """
        kept = [fold for fold in range(len(self.tokens)) if fold != without]
        n = sum(self.tokens[fold] for fold in kept)
        whole = dict(zip(_SUMS, self.sums[kept, self.pairs.index(pair)].sum(0).T, strict=True))
        power = whole["square"] - whole["value"].square() / n
        varies = torch.where(power > 0, power, torch.nan)
        return {
            "active": whole["first"],
            "frequency": whole["second"] / n,
            "persistence": whole["both"] / torch.where(whole["first"] > 0, whole["first"], torch.nan),
            "r2": 1 - whole["error"] / varies,
            "r2_unmoved": 1 - whole["change"] / varies,
        }

    def coincidence(self, pair: Pair, at_least: int = 20) -> Coincidence:
        """Compare persistence and R² over latents.

        Args:
            pair: The pair.
            at_least: Tokens at which a latent has to be active, at the first layer, and on average at the second.

        Raises:
            MomentsError: Fewer than ten latents are.
        """
        table = self.table(pair)
        often = (table["active"] >= at_least) & (table["frequency"] * sum(self.tokens) >= at_least) & ~table["r2"].isnan()
        if int(often.sum()) < 10:
            raise MomentsError(
                f"only {int(often.sum())} latents are active at {at_least} tokens of {pair[0]} and {pair[1]}: give more text"
            )
        values = [_correlations(table, often)]
        rest = [_correlations(self.table(pair, fold), often) for fold in range(len(self.tokens)) if len(self.tokens) > 1]
        intervals = []
        for which in range(2):
            spread = jackknife([one[which] for one in rest])
            value = values[0][which]
            intervals.append(Interval(value) if spread is None else spread.around(value))
        order = table["persistence"][often].argsort(stable=True)
        thirds = [float(part.median()) for part in table["r2"][often][order].tensor_split(3)]
        return Coincidence(
            pair,
            int(often.sum()),
            float(table["persistence"][often].mean()),
            float(table["r2"][often].median()),
            float(table["r2_unmoved"][often].median()),
            intervals[0],
            intervals[1],
            (thirds[0], thirds[1], thirds[2]),
        )


def _correlations(table: dict[str, torch.Tensor], often: torch.Tensor) -> tuple[float, float]:
    """Spearman's correlation of persistence and R², and the partial one, given the frequency."""
    ranks = [torch.from_numpy(stats.rankdata(table[name][often].nan_to_num().numpy())) for name in ("persistence", "r2", "frequency")]
    correlations = torch.corrcoef(torch.stack(ranks))
    a, b, c = float(correlations[0, 1]), float(correlations[0, 2]), float(correlations[1, 2])
    return a, (a - b * c) / ((1 - b**2) * (1 - c**2)) ** 0.5


def latent_transport(
    model: TransformersModel,
    sae: MultiLayerSAE,
    operators: Sequence[TransportOperator],
    corpus: Corpus | TokenBlocks,
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> LatentTransport:
    """Encode transported residuals beside those that are there, in one pass over test documents.

    Args:
        model: The model.
        sae: The SAE.
        operators: Of pairs of its layers, fitted on training documents.
        corpus: The text, tokenised already or not.
        batch_size: Token blocks per forward pass.
        progress: Told of batches done.

    Raises:
        MomentsError: No operators, or one between layers at which the SAE is not read.
        DictionaryError: The SAE is of another model.
    """
    sae.check_fits(describe(model))
    sae = sae.beside(model)
    pairs = tuple(operator.pair for operator in operators)
    if not pairs or not {site for pair in pairs for site in pair} <= set(sae.sites):
        raise MomentsError(f"give operators between layers at which the SAE is read: {', '.join(map(str, sae.sites))}")
    blocks = tokenize(model, corpus, progress).only("test")
    plan, classes = blocks.plan(batch_size), TokenClasses()
    tokens: dict[int, int] = {}
    sums: dict[int, torch.Tensor] = {}
    for number, rows in enumerate(plan):
        if progress is not None:
            progress("transporting latents", number, len(plan))
        batch = blocks.batch(rows)
        residuals = capture(model, batch.ids, sae.sites)
        x = residuals[:, classes.ordinary(batch.ids, batch.mask, batch.special, residuals)].float()
        found = sums.setdefault(batch.fold, torch.zeros(len(pairs), sae.latents, len(_SUMS), dtype=torch.float64))
        tokens[batch.fold] = tokens.get(batch.fold, 0) + x.shape[1]
        for part in torch.split(x, max(CELLS // sae.latents, 1), dim=1):
            dense = _dense(sae, sae.shared(part))
            for which, operator in enumerate(operators):
                first, second = (sae.sites.index(site) for site in operator.pair)
                moved = operator(part[first])[None]
                predicted = _dense(sae, sae.shared(moved, [operator.target]))[0]
                found[which] += _pair_sums(dense[first], dense[second], predicted)
    if progress is not None:
        progress("transporting latents", len(plan), len(plan))
    folds = sorted(sums)
    return LatentTransport(pairs, tuple(tokens[fold] for fold in folds), torch.stack([sums[fold] for fold in folds]))


def _dense(sae: MultiLayerSAE, shared: torch.Tensor) -> torch.Tensor:
    """Activations, float32 (sites, tokens, latents), of a few tokens."""
    values, latents = sae.encode(shared)
    return torch.zeros(*shared.shape[:-1], sae.latents, device=values.device).scatter_add_(-1, latents, values)


def _pair_sums(x: torch.Tensor, y: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """`_SUMS` of some tokens, float64 (latents, sums)."""
    on, off = x > 0, y > 0
    squares = (y.square(), (y - predicted).square(), (y - x).square())
    parts = (on, off, on & off, y, *squares)
    return torch.stack([part.sum(0, dtype=torch.float64) for part in parts], dim=1).cpu()
