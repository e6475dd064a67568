"""What the model loses when residuals are replaced: paired token losses, with intervals (METHODS §7)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import binomtest

from nnato.accumulation import default_corpus, tokenize
from nnato.corpus import Corpus, TokenBlocks
from nnato.edits import DEFAULT_INTERVENTIONS, INTERVENTIONS, Positions, intervention
from nnato.errors import ActivationError, OperatorError, RemoteError, TextError
from nnato.intervals import Interval
from nnato.losses import Item, Run, measure_all
from nnato.models import ModelInfo, describe
from nnato.nnsight_setup import save
from nnato.operators import TransportOperator
from nnato.remote import Server, in_words, run_job
from nnato.sites import Pair, ResidualSite
from nnato.statistics import Progress

if TYPE_CHECKING:
    from nnato.nnsight_setup import TransformersModel

RESAMPLES = 2000


@dataclass(frozen=True)
class Effect:
    """What one intervention did.

    Attributes:
        log_perplexity: Mean loss in nats over all predictions of all sequences, edited or not, as in the paper.
        delta_loss_diluted: Edited minus clean loss, mean over all predictions: small by construction when few positions are edited.
        delta_loss: The same, mean over positions from the first edited one on.
        delta_loss_at_edit: The same over the edited positions only.
        minus_transport: `delta_loss` minus that of `transport` on the same sequences; None if that was not asked for.
        kl: Mean KL(clean ‖ edited) of the next-token distributions, in nats, from the first edited position on.
        loss_recovered_mean: `(Δ_mean - Δ) / Δ_mean`, 1 when nothing is lost, 0 when as much as by the mean (SAELens'
            `ce_loss_score`, against the mean); NaN unless `mean` was asked for and its interval excludes 0.
        sign_test: Two-sided p-value of the sign test of the documents' mean Δ.
        per_sequence: float64 (sequences, 3): Δ from the first edit on, Δ at the edits, KL.
    """

    log_perplexity: float
    delta_loss_diluted: Interval
    delta_loss: Interval
    delta_loss_at_edit: Interval
    minus_transport: Interval | None
    kl: float
    loss_recovered_mean: float
    sign_test: float
    per_sequence: np.ndarray = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """The entry of `nnato ablate --json`; what is missing is null."""
        recovered = self.loss_recovered_mean
        return {
            "log_perplexity": self.log_perplexity,
            "delta_loss_diluted": self.delta_loss_diluted.to_json(),
            "delta_loss": self.delta_loss.to_json(),
            "delta_loss_at_edit": self.delta_loss_at_edit.to_json(),
            "minus_transport": self.minus_transport.to_json() if self.minus_transport else None,
            "kl": self.kl,
            "loss_recovered_mean": None if np.isnan(recovered) else recovered,
            "sign_test": self.sign_test,
            "per_sequence": self.per_sequence.tolist(),
        }


@dataclass(frozen=True)
class AblationResult:
    """The effects of editing one pair's target.

    Attributes:
        pair: (source, target).
        positions: The rule that chose positions.
        seed: Of the choice.
        sequences: Number of sequences.
        documents: Number of documents they come from, the unit of the bootstrap.
        edited: Edited positions of each sequence, the same for every intervention.
        text: Fingerprint of the text the sequences come from.
        log_perplexity: Of the unedited model on the same sequences.
        effects: By intervention.
    """

    pair: Pair
    positions: Positions
    seed: int
    sequences: int
    documents: int
    edited: list[list[int]] = field(repr=False)
    text: dict[str, Any] = field(repr=False)
    log_perplexity: float
    effects: dict[str, Effect]

    @property
    def skipped(self) -> int:
        """Explicit positions that were left alone, summed over sequences, because the token there is not ordinary."""
        wanted = len(self.positions.explicit)
        return sum(wanted - len(edited) for edited in self.edited) if wanted else 0

    def to_json(self) -> dict[str, Any]:
        """The entry of `nnato ablate --json`."""
        return {
            "source": self.pair[0].key,
            "target": self.pair[1].key,
            "positions": str(self.positions),
            "seed": self.seed,
            "sequences": self.sequences,
            "documents": self.documents,
            "edited_positions": self.edited,
            "skipped_positions": self.skipped,
            "interventions": {
                "none": {"log_perplexity": self.log_perplexity},
                **{name: effect.to_json() for name, effect in self.effects.items()},
            },
        }


def ablate(
    model: TransformersModel,
    operators: Iterable[TransportOperator],
    corpus: Corpus | TokenBlocks | None = None,
    *,
    positions: int | str | Positions = 5,
    interventions: Sequence[str] = DEFAULT_INTERVENTIONS,
    sequences: int = 24,
    seed: int = 0,
    server: Server | None = None,
    per_job: int = 16,
    progress: Progress | None = None,
) -> list[AblationResult]:
    """Replace residuals at a few positions of each test sequence and measure the loss.

    Every condition sees the same sequences and positions. A sequence is one full block of a test document; documents are used once as
    long as they last. Edited passes resume behind the edited block, and only logits that can change are computed.

    Args:
        model: The model.
        operators: Fitted operators, one per pair.
        corpus: The text, tokenised already or not; its test documents are used. By default the one the first operator was fitted on.
        positions: How many to draw (5), which ("10,50,70"), or "all"; ordinary tokens only.
        interventions: Names from `edits.INTERVENTIONS`.
        sequences: How many.
        seed: Of the positions and the bootstrap.
        server: Run the model on it, e.g. `NdifServer()`; operators travel there, and only numbers per sequence come back.
        per_job: Sequences in one job on a server, at most.
        progress: Told of each sequence.

    Returns:
        One result per operator.

    Raises:
        OperatorError: An operator is of another model, or an intervention is unknown.
        SiteError: An operator's target does not exist.
        PositionError: Positions outside the sequences, or more than there are; or sequences too long for the model.
        TextError: Too little text, or sequences of a single document.
        ActivationError: A loss is not finite.
        RemoteError: A job on the server failed.
    """
    info, operators, spec = describe(model), list(operators), Positions.parse(positions)
    check_interventions(interventions)
    if not operators:
        raise OperatorError("nothing to do: give at least one operator")
    for operator in operators:
        check_operator(operator, info)
    maps = [{name: intervention(name, operator) for name in dict.fromkeys(interventions)} for operator in operators]
    corpus = corpus or corpus_of(operators[0], info)
    spec.check(corpus.context)
    blocks = tokenize(model, corpus, progress)
    rows = choose_sequences(blocks, sequences)
    documents = blocks.index[rows, 3]
    medians = _medians(operators)
    sites = sorted(medians)
    runs = [(operator.source, operator.target, chosen) for operator, chosen in zip(operators, maps, strict=True)]
    thresholds = torch.tensor([medians[site] for site in sites], dtype=torch.float64)
    items = [_item(blocks, row, number, spec.order(corpus.context, seed, number)) for number, row in enumerate(rows.tolist())]
    if server is not None:
        size = sum(8 * operator.weight.numel() for operator in operators) + 9 * len(rows) * corpus.context
        server.say(f"{len(items)} sequences in {-(-len(items) // per_job)} jobs: about {in_words(size)} to send with each, numbers back")
    measured: list[dict[str, Any]] = []
    while len(measured) < len(items):
        if progress is not None:
            progress("sequences", len(measured), len(items))
        some = items[len(measured) :][: 1 if server is None else per_job]
        label = f"{blocks.fingerprint['digest']} {seed} {some[0][0]}-{some[-1][0]}"
        answers = _measure(model, server, label, some, sites, thresholds, spec.count, runs)
        for (number, *_), answer in zip(some, answers, strict=True):
            _check_finite(answer["changes"], number, operators, list(maps[0]))
        measured += answers
    if progress is not None:
        progress("sequences", len(items), len(items))
    changes = np.stack([one["changes"].numpy() for one in measured])  # (sequences, pairs, interventions, 4)
    log_perplexity = float(torch.stack([one["losses"] for one in measured]).mean())
    return [
        AblationResult(
            pair=operator.pair,
            positions=spec,
            seed=seed,
            sequences=len(rows),
            documents=len(np.unique(documents)),
            edited=[one["edited"] for one in measured],
            text=blocks.fingerprint,
            log_perplexity=log_perplexity,
            effects=effects_of(list(chosen), changes[:, place], log_perplexity, documents, seed),
        )
        for place, (operator, chosen) in enumerate(zip(operators, maps, strict=True))
    ]


def _item(blocks: TokenBlocks, row: int, number: int, order: list[int]) -> Item:
    tokens = blocks.batch([row])
    return number, tokens.ids, tokens.special, order


def _measure(
    model: TransformersModel,
    server: Server | None,
    label: str,
    some: Sequence[Item],
    sites: Sequence[ResidualSite],
    medians: torch.Tensor,
    count: int | None,
    runs: Sequence[Run],
) -> list[dict[str, Any]]:
    """Measure some sequences, here or in one job on a server."""
    if server is None:
        with torch.no_grad():
            here: list[dict[str, Any]] = measure_all(model, label, some, sites, medians, count, runs)["measured"]
        return here

    def send(backend: Any) -> None:
        with torch.no_grad(), model.session(backend=backend):
            answer = save(measure_all(model, label, some, sites, medians, count, runs))  # noqa: F841

    answer = run_job(server, model, send).get("answer")
    if not isinstance(answer, dict) or answer.get("label") != label:
        raise RemoteError("the answer is not of this job: with --resume-job, repeat exactly the call that sent it")
    measured: list[dict[str, Any]] = answer["measured"]
    wanted = (len(runs), len(runs[0][2]), 4), (some[0][1].shape[1] - 1,)
    if len(measured) != len(some) or any((one["changes"].shape, one["losses"].shape) != wanted for one in measured):
        raise RemoteError("the answer does not hold what was asked for; nothing was kept")
    return measured


def _check_finite(changes: torch.Tensor, sequence: int, operators: Sequence[TransportOperator], names: Sequence[str]) -> None:
    bad = torch.nonzero(~torch.isfinite(changes)).tolist()
    if bad:
        place, number, _ = bad[0]
        pair = f"{operators[place].source}:{operators[place].target}"
        raise ActivationError(f"{names[number]} at {pair} gives a loss that is not finite in sequence {sequence}")


def choose_sequences(blocks: TokenBlocks, count: int) -> np.ndarray:
    """Row numbers of test sequences to edit, int64 (count,).

    Raises:
        TextError: There are too few, or all come from one document, so that no interval can be given.
    """
    if count < 2:
        raise TextError(f"{count} sequences: an interval needs at least 2")
    rows = blocks.full_blocks("test", count)
    if len(np.unique(blocks.index[rows, 3])) < 2:
        raise TextError(f"all {count} test sequences come from one document: an interval needs more; give more text")
    return rows


def check_interventions(names: Sequence[str]) -> None:
    """Refuse names of interventions that nobody knows.

    Raises:
        OperatorError: One is unknown, or there are none.
    """
    if unknown := [name for name in names if name not in INTERVENTIONS]:
        raise OperatorError(f"unknown intervention {unknown[0]!r}; known are {', '.join(INTERVENTIONS)}")
    if not names:
        raise OperatorError(f"nothing to do: give at least one intervention of {', '.join(INTERVENTIONS)}")


def check_operator(operator: TransportOperator, info: ModelInfo) -> None:
    """Refuse an operator that does not belong to a model.

    Raises:
        SiteError: The model has no such target.
        OperatorError: The operator has another width, or was fitted on other weights.
    """
    ResidualSite.parse(operator.target, info.blocks)
    if tuple(operator.weight.shape) != (info.d_model, info.d_model):
        raise OperatorError(
            f"operator {operator.source}:{operator.target} maps width {operator.weight.shape[0]} to {operator.weight.shape[1]}, "
            f"but {info.name} has width {info.d_model}"
        )
    fitted_on = operator.details.get("model", {})
    if not info.fits(fitted_on):
        raise OperatorError(
            f"operator {operator.source}:{operator.target} was fitted on {fitted_on.get('name')} ({fitted_on.get('dtype')}), "
            f"not on {info.name} ({info.dtype}): fit it again"
        )


def corpus_of(operator: TransportOperator, info: ModelInfo) -> Corpus:
    """The corpus an operator was fitted on, as far as it says."""
    text = operator.details.get("text", {})
    keys = ("source", "context", "tokens", "per_document", "column")
    return Corpus(**{key: text[key] for key in keys}) if all(key in text for key in keys) else default_corpus(info)


def _medians(operators: Iterable[TransportOperator]) -> dict[ResidualSite, float]:
    """The frozen median norms of all sites that took part in the fits' token classes; the smallest where several fits know a site.

    So the tokens that can be edited are those that were fitted on. An operator made by hand records no medians: for it no token is a sink.
    """
    medians: dict[ResidualSite, float] = {}
    for operator in operators:
        recorded = {ResidualSite.parse(site): float(median) for site, median in operator.details.get("medians", {}).items()}
        for site, median in ({site: float("inf") for site in operator.pair} | recorded).items():
            medians[site] = min(median, medians.get(site, float("inf")))
    return medians


def effects_of(names: Sequence[str], changes: np.ndarray, log_perplexity: float, documents: np.ndarray, seed: int) -> dict[str, Effect]:
    """Effects of one pair's interventions.

    Args:
        names: The interventions.
        changes: float64 (sequences, interventions, 4), as `losses.measure` gives them.
        log_perplexity: Unedited, in nats.
        documents: int64 (sequences,), the document of each sequence.
        seed: Of the bootstrap.
    """
    bootstrap = Bootstrap(documents, seed)
    delta = {name: changes[:, number, 1] for number, name in enumerate(names)}
    intervals = {name: bootstrap.interval(values) for name, values in delta.items()}
    mean = intervals.get("mean")
    usable = mean is not None and not mean.low <= 0 <= mean.high
    effects = {}
    for number, name in enumerate(names):
        values = changes[:, number]
        means = bootstrap.by_document(delta[name])
        moved = means[means != 0]
        compared = "transport" in delta and name != "transport"
        diluted = bootstrap.interval(values[:, 0])
        effects[name] = Effect(
            log_perplexity=log_perplexity + diluted.value,
            delta_loss_diluted=diluted,
            delta_loss=intervals[name],
            delta_loss_at_edit=bootstrap.interval(values[:, 2]),
            minus_transport=bootstrap.interval(delta[name] - delta["transport"]) if compared else None,
            kl=float(values[:, 3].mean()),
            loss_recovered_mean=1 - intervals[name].value / mean.value if mean is not None and usable else float("nan"),
            sign_test=float(binomtest(int((moved > 0).sum()), len(moved)).pvalue) if len(moved) else 1.0,
            per_sequence=values[:, 1:],
        )
    return effects


class Bootstrap:
    """Percentile intervals of a mean over sequences, resampling documents; paired, since every statistic shares the resamples.

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

    def by_document(self, values: np.ndarray) -> np.ndarray:
        """Means of one value per sequence over each document's sequences, float64 (documents,)."""
        sums: np.ndarray = np.bincount(self.clusters, weights=values, minlength=len(self.sizes))
        return sums / self.sizes

    def interval(self, values: np.ndarray) -> Interval:
        """Mean and 95 % interval of one value per sequence, float64 (sequences,)."""
        sums = self.by_document(values) * self.sizes
        means = (self.weights @ sums) / (self.weights @ self.sizes)
        low, high = np.quantile(means, (0.025, 0.975))
        return Interval(float(values.mean()), float(low), float(high))
