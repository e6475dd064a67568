"""Effects of edits: paired differences with intervals over documents (METHODS §7, §9)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from nnato.edits import EditRecord
from nnato.intervals import LEVEL, Interval
from nnato.notebook import html_table
from nnato.positions import Draws, Positions
from nnato.sites import Pair

RESAMPLES = 2000
REFERENCES = ("mean", "zero", "resample")
"""Interventions against which the loss recovered is taken."""


@dataclass(frozen=True)
class Distance:
    """What happened so many positions behind an edit.

    Attributes:
        first: Smallest distance from the last edit before.
        last: Largest.
        positions: How many there were, over sequences and draws.
        delta_loss: Mean Δ, in nats.
        kl: Mean KL(clean ‖ edited).
        agreement: Share at which the most likely next token stayed the same.
    """

    first: int
    last: int
    positions: int
    delta_loss: Interval
    kl: Interval
    agreement: Interval

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        intervals = {name: getattr(self, name).to_json() for name in ("delta_loss", "kl", "agreement")}
        return {"distance": [self.first, self.last], "positions": self.positions, **intervals}


@dataclass(frozen=True)
class Effect:
    """What one intervention did.

    Attributes:
        edit: What was put where.
        log_perplexity: Mean loss in nats over all predictions of all sequences, edited or not, as in the paper.
        delta_loss_diluted: Edited minus clean loss, mean over all predictions: small by construction when few positions are edited.
        delta_loss: The same, mean over positions from the first edited one on.
        delta_loss_at_edit: The same over the edited positions only.
        minus_transport: `delta_loss` minus that of `transport` on the same sequences; None if that was not asked for.
        at_edit_minus_transport: The same of `delta_loss_at_edit`.
        kl_interval: Mean KL(clean ‖ edited) of the next-token distributions, in nats, from the first edited position on.
        kl_at_edit: The same over the edited positions only.
        kl_after: The same over the others.
        kl_minus_transport: `kl` minus that of `transport`; None if that was not asked for.
        agreement: Share of positions from the first edited one on at which the most likely next token stays the same.
        agreement_at_edit: The same over the edited positions only.
        by_distance: By distance from the last edit before, in bins 0, 1, 2-3, 4-7, 8-15, ….
        loss_recovered: By reference (`mean`, `zero`, `resample`): `(Δ_reference - Δ) / Δ_reference` from the first edit on, 1 when nothing
            is lost, 0 when as much as by the reference. Only references that were asked for; NaN where the interval of Δ_reference holds 0.
        ce_loss_score: SAELens' number of this name: the same against `zero`, over all predictions.
        sign_test: Two-sided p-value of the sign test of the documents' mean Δ.
        per_sequence: float64 (sequences, 3): Δ from the first edit on, Δ at the edits, KL, means over draws; NaN where nothing was edited.
    """

    edit: EditRecord
    log_perplexity: float
    delta_loss_diluted: Interval
    delta_loss: Interval
    delta_loss_at_edit: Interval
    minus_transport: Interval | None
    at_edit_minus_transport: Interval | None
    kl_interval: Interval
    kl_at_edit: Interval
    kl_after: Interval
    kl_minus_transport: Interval | None
    agreement: Interval
    agreement_at_edit: Interval
    by_distance: tuple[Distance, ...] = field(repr=False)
    loss_recovered: dict[str, Interval]
    ce_loss_score: Interval
    sign_test: float
    per_sequence: np.ndarray = field(repr=False)

    @property
    def kl(self) -> float:
        """The mean of `kl_interval`."""
        return self.kl_interval.value

    @property
    def loss_recovered_mean(self) -> float:
        """`loss_recovered` against the mean; NaN if that was not asked for."""
        return self.loss_recovered["mean"].value if "mean" in self.loss_recovered else float("nan")

    def to_json(self) -> dict[str, Any]:
        """The entry of `nnato ablate --json`; what is missing is null."""
        recovered = self.loss_recovered_mean
        losses = ("delta_loss_diluted", "delta_loss", "delta_loss_at_edit", "minus_transport", "at_edit_minus_transport")
        others = ("kl_interval", "kl_at_edit", "kl_after", "kl_minus_transport", "agreement", "agreement_at_edit", "ce_loss_score")
        intervals = {name: getattr(self, name) for name in (*losses, *others)}
        return {
            "log_perplexity": self.log_perplexity,
            **{name: None if value is None else _plain(value) for name, value in intervals.items()},
            "kl": self.kl,
            "loss_recovered_mean": None if np.isnan(recovered) else recovered,
            "loss_recovered": {name: _plain(value) for name, value in self.loss_recovered.items()},
            "by_distance": [one.to_json() for one in self.by_distance],
            "sign_test": self.sign_test,
            "per_sequence": [[None if np.isnan(value) else value for value in row] for row in self.per_sequence.tolist()],
            "edit": self.edit.to_json(),
        }


def _plain(interval: Interval) -> dict[str, float | None]:
    """An interval with null for what is not a number."""
    return {name: None if np.isnan(value) else value for name, value in interval.to_json().items()}


@dataclass(frozen=True)
class AblationResult:
    """The effects of editing one pair's target, or those of several pairs in one pass.

    Attributes:
        pair: (source, target); of several, the first source and the last target.
        chain: All pairs that are edited in one pass.
        draws: The sets of positions, and the seeds that drew them.
        seed: Of the bootstrap, and of the first draw.
        sequences: Number of sequences.
        documents: Number of documents they come from, the unit of the bootstrap.
        tokens: Number of tokens of these sequences.
        drawn: Edited positions, by set and sequence, the same for every intervention.
        text: Fingerprint of the text the sequences come from.
        log_perplexity: Of the unedited model on the same sequences.
        effects: By intervention.
    """

    pair: Pair
    chain: tuple[Pair, ...]
    draws: Draws
    seed: int
    sequences: int
    documents: int
    tokens: int
    drawn: list[list[list[int]]] = field(repr=False)
    text: dict[str, Any] = field(repr=False)
    log_perplexity: float
    effects: dict[str, Effect]

    @property
    def positions(self) -> Positions:
        """The rule of the first set."""
        return self.draws.first

    @property
    def edited(self) -> list[list[int]]:
        """Edited positions of each sequence in the first set."""
        return self.drawn[0]

    @property
    def skipped(self) -> int:
        """Explicit positions that were left alone, summed over sequences and sets, because the token there is not ordinary."""
        sets = zip(self.draws.sets, self.drawn, strict=True)
        return sum(len(rule.explicit) - len(edited) for (rule, _), drawn in sets if rule.explicit for edited in drawn)

    @property
    def unedited(self) -> int:
        """Sequences without any position of the wanted kind: they count as unchanged in the log-perplexity, and nowhere else."""
        return sum(not any(drawn[number] for drawn in self.drawn) for number in range(self.sequences))

    def _repr_html_(self) -> str:
        columns = ("put in", "log-perplexity", "Δloss at edits", "KL", "over transport", "recovered")
        rows: list[tuple[Any, ...]] = [("(unedited)", self.log_perplexity, "", "", "", "")]
        for name, one in self.effects.items():
            over = one.minus_transport or ""
            rows.append((name, one.log_perplexity, one.delta_loss_at_edit, one.kl_interval, over, one.loss_recovered_mean))
        note = f"nats; 95 % intervals, paired bootstrap over {self.documents} documents"
        return html_table(f"{self.name()}: {self.draws.describe()}, {self.size()}", columns, rows, note)

    def name(self) -> str:
        """The pair in words, for titles."""
        return " + ".join(f"{source} → {target}" for source, target in self.chain)

    def size(self) -> str:
        """Sequences, tokens and seeds in words, for titles."""
        seeds = self.draws.seeds
        return f"{self.sequences} sequences × {self.tokens // self.sequences} tokens, " + (
            f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
        )

    def to_json(self) -> dict[str, Any]:
        """The entry of `nnato ablate --json`."""
        return {
            "source": self.pair[0].key,
            "target": self.pair[1].key,
            "chain": [[source.key, target.key] for source, target in self.chain],
            "positions": self.draws.rule,
            "seed": self.seed,
            "seeds": list(self.draws.seeds),
            "sequences": self.sequences,
            "documents": self.documents,
            "tokens": self.tokens,
            "edited_positions": self.edited,
            "draws": [
                {"positions": str(rule), "seed": seed, "edited_positions": drawn}
                for (rule, seed), drawn in zip(self.draws.sets, self.drawn, strict=True)
            ],
            "skipped_positions": self.skipped,
            "unedited_sequences": self.unedited,
            "interventions": {
                "none": {"log_perplexity": self.log_perplexity},
                **{name: effect.to_json() for name, effect in self.effects.items()},
            },
        }


@dataclass(frozen=True)
class Measured:
    """Sums over positions, as `losses.measure` gives them.

    Attributes:
        sums: float64 (sequences, sets, interventions, bins, 3): Δ, KL, agreement.
        counts: float64 (sequences, sets, bins).
        predictions: Of each sequence.
    """

    sums: np.ndarray
    counts: np.ndarray
    predictions: int

    def diluted(self) -> np.ndarray:
        """Mean Δ over all predictions, float64 (sequences, interventions)."""
        means: np.ndarray = self.sums[..., 0].sum(-1).mean(1) / self.predictions
        return means

    def means(self, column: int, bins: slice) -> np.ndarray:
        """Means over the positions of some bins and then over sets, float64 (sequences, interventions); NaN where there are none."""
        counts = self.counts[:, :, bins].sum(-1)[..., None]
        usable = counts > 0
        ratios = np.divide(self.sums[..., bins, column].sum(-1), counts, out=np.zeros(self.sums.shape[:3]), where=usable)
        sets = usable.sum(1)
        found: np.ndarray = np.where(sets > 0, ratios.sum(1) / np.maximum(sets, 1), np.nan)
        return found


def effects_of(
    edits: Mapping[str, EditRecord], measured: Measured, log_perplexity: float, documents: np.ndarray, seed: int
) -> dict[str, Effect]:
    """Effects of one pair's interventions.

    Args:
        edits: The interventions, in the order of the sums.
        measured: What was measured.
        log_perplexity: Unedited, in nats.
        documents: int64 (sequences,), the document of each sequence.
        seed: Of the bootstrap.
    """
    names = list(edits)
    every, at, after = slice(None), slice(0, 1), slice(1, None)
    known = measured.counts.sum((1, 2)) > 0
    whole, bootstrap = Bootstrap(documents, seed), Bootstrap(documents[known], seed)
    diluted = measured.diluted()
    delta, delta_at = measured.means(0, every), measured.means(0, at)
    kl, kl_at = measured.means(1, every), measured.means(1, at)
    used = {name: number for number, name in enumerate(names) if name in REFERENCES}
    effects = {}
    for number, name in enumerate(names):

        def of(values: np.ndarray, number: int = number) -> Interval:
            return bootstrap.interval(values[known, number])

        def against(values: np.ndarray, number: int = number, name: str = name) -> Interval | None:
            if name == "transport" or "transport" not in names:
                return None
            return bootstrap.interval(values[known, number] - values[known, names.index("transport")])

        dilution = whole.interval(diluted[:, number])
        effects[name] = Effect(
            edit=edits[name],
            log_perplexity=log_perplexity + dilution.value,
            delta_loss_diluted=dilution,
            delta_loss=of(delta),
            delta_loss_at_edit=of(delta_at),
            minus_transport=against(delta),
            at_edit_minus_transport=against(delta_at),
            kl_interval=of(kl),
            kl_at_edit=of(kl_at),
            kl_after=of(measured.means(1, after)),
            kl_minus_transport=against(kl),
            agreement=of(measured.means(2, every)),
            agreement_at_edit=of(measured.means(2, at)),
            by_distance=_by_distance(measured, number, known, bootstrap),
            loss_recovered={one: bootstrap.recovered(delta[known, number], delta[known, place]) for one, place in used.items()},
            ce_loss_score=whole.recovered(diluted[:, number], diluted[:, used["zero"]]) if "zero" in used else Interval(float("nan")),
            sign_test=sign_test(bootstrap.by_document(delta[known, number])),
            per_sequence=np.stack([values[:, number] for values in (delta, delta_at, kl)], axis=1),
        )
    return effects


def _by_distance(measured: Measured, number: int, known: np.ndarray, bootstrap: Bootstrap) -> tuple[Distance, ...]:
    """Means by distance over all sequences and sets together."""
    counts, sums = measured.counts.sum(1)[known], measured.sums[:, :, number].sum(1)[known]
    found = []
    for one in range(counts.shape[1]):
        positions = int(counts[:, one].sum())
        if positions:
            first, last = (0, 0) if one == 0 else (2 ** (one - 1), 2**one - 1)
            intervals = [bootstrap.ratio(sums[:, one, column], counts[:, one]) for column in range(3)]
            found.append(Distance(first, last, positions, *intervals))
    return tuple(found)


def sign_test(values: np.ndarray) -> float:
    """Two-sided p-value that values, float64 (n,), are as often above zero as below; zeros are left out."""
    moved = values[values != 0]
    return float(stats.binomtest(int((moved > 0).sum()), len(moved)).pvalue) if len(moved) else 1.0


class Bootstrap:
    """Intervals of a mean over sequences, resampling documents; paired, since every statistic shares the resamples.

    Expanded percentiles (Hesterberg 2015): plain ones of n documents are too narrow by `√((n-1)/n)` and as the normal distribution is
    beside Student's, so the levels are those that would give the t interval of normal data.

    Args:
        documents: int64 (sequences,), the document of each sequence.
        seed: Of the resamples.
    """

    def __init__(self, documents: np.ndarray, seed: int) -> None:
        self.clusters = np.unique(documents, return_inverse=True)[1].reshape(-1)
        groups = int(self.clusters.max()) + 1
        rng = np.random.default_rng([seed, 1])
        self.weights = rng.multinomial(groups, np.full(groups, 1 / groups), size=RESAMPLES)
        self.sizes = np.bincount(self.clusters, minlength=groups)
        tail = stats.t.ppf((1 - LEVEL) / 2, groups - 1) if groups > 1 else np.nan
        low = float(stats.norm.cdf(np.sqrt(groups / max(groups - 1, 1)) * tail))
        self.levels = low, 1 - low

    def by_document(self, values: np.ndarray) -> np.ndarray:
        """Means of one value per sequence over each document's sequences, float64 (documents,)."""
        return self._sums(values) / self.sizes

    def _sums(self, values: np.ndarray) -> np.ndarray:
        sums: np.ndarray = np.bincount(self.clusters, weights=values, minlength=len(self.sizes))
        return sums

    def interval(self, values: np.ndarray) -> Interval:
        """Mean and 95 % interval of one value per sequence, float64 (sequences,); NaN values are left out."""
        there = ~np.isnan(values)
        return self.ratio(np.where(there, values, 0.0), there.astype(float))

    def ratio(self, numerators: np.ndarray, denominators: np.ndarray) -> Interval:
        """A ratio of sums over sequences with its 95 % interval, of the resamples that have a denominator; NaN without any."""
        below = self.weights @ self._sums(denominators)
        if not denominators.sum() or not below.any():
            return Interval(float("nan"))
        value = float(numerators.sum() / denominators.sum())
        if len(self.sizes) < 2:
            return Interval(value)
        ratios = (self.weights @ self._sums(numerators))[below != 0] / below[below != 0]
        low, high = np.quantile(ratios, self.levels)
        return Interval(value, float(low), float(high))

    def recovered(self, lost: np.ndarray, reference: np.ndarray) -> Interval:
        """`1 - Σ lost / Σ reference`; NaN if the interval of the mean of the reference contains 0."""
        bounds = self.interval(reference)
        if not bounds.low > 0 and not bounds.high < 0:
            return Interval(float("nan"))
        return self.ratio(reference - lost, reference)
