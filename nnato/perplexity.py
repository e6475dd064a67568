"""What the model loses when residuals are replaced: sequences, edits, and where they run (METHODS §7)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nnato.accumulation import default_corpus, tokenize
from nnato.corpus import Corpus, TokenBlocks
from nnato.edits import DEFAULT_INTERVENTIONS, FITTED_CONTROLS, INTERVENTIONS, EditRecord, Supplies, intervention, is_rank
from nnato.effects import AblationResult, Measured, effects_of
from nnato.errors import ActivationError, OperatorError, PositionError, RemoteError, TextError, did_you_mean
from nnato.losses import Item, Run, Set, bins_of, measure_all
from nnato.models import ModelInfo, describe
from nnato.nnsight_setup import save
from nnato.operators import TransportOperator
from nnato.positions import Draws, Positions, token_class
from nnato.remote import Server, in_words, labelled, run_job
from nnato.sites import Pair, ResidualSite
from nnato.statistics import Progress

if TYPE_CHECKING:
    from nnato.nnsight_setup import TransformersModel

SEQUENCES = 24
"""Sequences of an ablation that asks for no number."""


def ablate(
    model: TransformersModel,
    operators: Iterable[TransportOperator],
    corpus: Corpus | TokenBlocks | None = None,
    *,
    positions: int | str | Positions = 5,
    interventions: Sequence[str] = DEFAULT_INTERVENTIONS,
    sequences: int | None = None,
    seed: int = 0,
    seeds: int = 1,
    controls: Iterable[TransportOperator] = (),
    features: torch.Tensor | None = None,
    steering: torch.Tensor | None = None,
    subspaces: Mapping[Pair, tuple[torch.Tensor, torch.Tensor]] | None = None,
    chain: bool = False,
    split: str = "test",
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
        positions: How many to draw (5), which ("10,50,70"), "all", "last", "every:8", a class of tokens ("number", "number:2"),
            "active>1.5", or a preset of the paper ("multiple_js"); ordinary tokens only.
        interventions: Names from `edits.INTERVENTIONS`, or of controls.
        sequences: How many; by default 24, or as many as there are.
        seed: Of the positions, the random rotations and the bootstrap.
        seeds: Draw positions so many times, with the seeds that follow; results are averaged over draws within each sequence.
        controls: Further operators, which are interventions by their names at their pairs: those of `controls_of`, for example.
        features: Directions at the target, float (directions, d_model): of the intervention `features`, and of positions "active>…".
        steering: The vector that `steer` adds, float (d_model,).
        subspaces: Factors of the projector onto the transport subspace by pair, for `lts` and `lts_complement`.
        chain: Edit the targets of all operators in the same pass, from the first on, instead of each in its own; one result.
        split: Documents to take sequences from; what is chosen by a loss has to be chosen on `validation`.
        server: Run the model on it, e.g. `NdifServer()`; operators travel there, and only numbers per sequence come back.
        per_job: Sequences in one job on a server, at most.
        progress: Told of each sequence.

    Returns:
        One result per operator.

    Raises:
        OperatorError: An operator is of another model, or an intervention is unknown or lacks what it needs.
        SiteError: An operator's target does not exist.
        PositionError: Positions outside the sequences, or more than there are; or sequences too long for the model.
        TextError: Too little text, or sequences of a single document.
        ActivationError: A loss is not finite.
        RemoteError: A job on the server failed.
    """
    info, operators, draws = describe(model), list(operators), Draws.parse(positions, seed, seeds)
    if not operators:
        raise OperatorError("nothing to do: give at least one operator")
    supplies = Supplies(_by_pair(controls), features, steering, subspaces or {}, seed)
    check_interventions(interventions, [one for mine in supplies.controls.values() for one in mine])
    for operator in [*operators, *(one for mine in supplies.controls.values() for one in mine.values())]:
        check_operator(operator, info)
    directions = _directions(draws, features, interventions, info)
    runs = _runs(operators, list(dict.fromkeys(interventions)), supplies, chain)
    shared = _shared(runs)
    corpus = corpus or corpus_of(operators[0], info)
    draws.check(corpus.context)
    blocks = tokenize(model, corpus, progress)
    rows = choose_sequences(blocks, sequences, split)
    documents = blocks.index[rows, 3]
    medians = _medians(operators)
    sites = sorted(medians)
    thresholds = torch.tensor([medians[site] for site in sites], dtype=torch.float64)
    items = _items(model, blocks, rows, draws, "resample" in interventions)
    if server is not None:
        size = sum(8 * operator.weight.numel() for operator in operators) + 9 * len(rows) * corpus.context
        server.say(f"{len(items)} sequences in {-(-len(items) // per_job)} jobs: about {in_words(size)} to send with each, numbers back")
    measured: list[dict[str, Any]] = []
    while len(measured) < len(items):
        if progress is not None:
            progress("sequences", len(measured), len(items))
        some = items[len(measured) :][: 1 if server is None else per_job]
        label = f"{blocks.fingerprint['digest']} {draws.rule} {seed} {some[0][0]}-{some[-1][0]}"
        answers = _measure(model, server, label, some, sites, thresholds, runs, shared, directions)
        for (number, *_), answer in zip(some, answers, strict=True):
            _check_finite(answer["sums"], number, runs)
        measured += answers
    if progress is not None:
        progress("sequences", len(items), len(items))
    drawn = [[one["edited"][place] for one in measured] for place in range(len(draws.sets))]
    _check_edited(drawn, documents, draws)
    sums = np.stack([one["sums"].numpy() for one in measured])  # (sequences, sets, runs, interventions, bins, 3)
    counts = np.stack([one["counts"].numpy() for one in measured])
    log_perplexity = float(torch.stack([one["losses"] for one in measured]).mean())
    results = []
    for place, run in enumerate(runs):
        links = tuple((source, target) for source, target, _ in run)
        edits = {
            name: EditRecord.of(name, [((source, target), ways[name]) for source, target, ways in run], draws.rule, draws.seeds)
            for name in run[0][2]
        }
        results.append(
            AblationResult(
                pair=(links[0][0], links[-1][1]),
                chain=links,
                draws=draws,
                seed=seed,
                sequences=len(rows),
                documents=len(np.unique(documents)),
                tokens=len(rows) * blocks.context,
                drawn=drawn,
                text=blocks.fingerprint,
                log_perplexity=log_perplexity,
                effects=effects_of(edits, Measured(sums[:, :, place], counts, blocks.context - 1), log_perplexity, documents, seed),
            )
        )
    return results


def _by_pair(controls: Iterable[TransportOperator]) -> dict[Pair, dict[str, TransportOperator]]:
    found: dict[Pair, dict[str, TransportOperator]] = {}
    for control in controls:
        mine = found.setdefault(control.pair, {})
        if control.name in mine or control.name in set(INTERVENTIONS) - set(FITTED_CONTROLS):
            raise OperatorError(f"the name {control.name!r} of a control at {control.source}:{control.target} is taken: give it another")
        mine[control.name] = control
    return found


def _directions(draws: Draws, features: torch.Tensor | None, interventions: Sequence[str], info: ModelInfo) -> torch.Tensor | None:
    """The directions whose activity decides positions, checked; None if nothing does."""
    wanted = any(rule.above is not None for rule, _ in draws.sets)
    if features is None:
        if wanted:
            raise PositionError(f"positions {draws.rule!r} are where a feature is active: give its directions as features")
        return None
    if not wanted and "features" not in interventions:
        raise OperatorError("directions are given, but neither the intervention features nor positions active>… use them")
    if features.dim() != 2 or features.shape[1] != info.d_model:
        raise OperatorError(f"directions of shape {tuple(features.shape)}: give (directions, {info.d_model})")
    return features.double() if wanted else None


def _runs(operators: Sequence[TransportOperator], names: Sequence[str], supplies: Supplies, chain: bool) -> list[Run]:
    """What to carry out: one step per operator, each in its own pass or all in one."""
    steps = [(one.source, one.target, {name: intervention(name, one, supplies) for name in names}) for one in operators]
    if not chain:
        return [[step] for step in steps]
    steps.sort(key=lambda step: step[1])
    if len({step[1] for step in steps}) < len(steps):
        raise OperatorError("a chain edits each target once: give operators with different targets")
    return [steps]


def _shared(runs: Sequence[Run]) -> list[str]:
    """Interventions that put the same into a target whatever the source is, so that pairs with that target can share them."""
    means: dict[ResidualSite, TransportOperator] = {}
    found = [name for name in ("resample", "steer", "zero", "mean") if name in runs[0][0][2]]
    for run in runs:
        for _, target, ways in run:
            mean = ways["mean"][1] if "mean" in found else None
            if isinstance(mean, TransportOperator) and not torch.equal(means.setdefault(target, mean).target_mean, mean.target_mean):
                found.remove("mean")
    return found


def _items(model: TransformersModel, blocks: TokenBlocks, rows: np.ndarray, draws: Draws, resample: bool) -> list[Item]:
    """The sequences with the positions to edit, and for `resample` each with the next one of another document."""
    documents = blocks.index[rows, 3]
    items: list[Item] = []
    for number, row in enumerate(rows.tolist()):
        tokens, other = blocks.batch([row]), None
        classes: list[str] = []
        if any(rule.tokens for rule, _ in draws.sets):
            classes = [token_class(model.tokenizer.decode([token])) for token in tokens.ids[0].tolist()]
        if resample:
            after = np.roll(np.arange(len(rows)), -number)
            donor = blocks.batch([rows[after[documents[after] != documents[number]][0]]])
            other = donor.ids, donor.special
        sets: list[Set] = [
            (rule.order(blocks.context, seed, number, classes), rule.limit, rule.above, rule.may_be_absent) for rule, seed in draws.sets
        ]
        items.append((number, tokens.ids, tokens.special, other, sets))
    return items


def _check_edited(drawn: list[list[list[int]]], documents: np.ndarray, draws: Draws) -> None:
    edited = [number for number in range(len(documents)) if any(one[number] for one in drawn)]
    if len({documents[number] for number in edited}) < 2:
        raise PositionError(
            f"only {len(edited)} of {len(documents)} sequences have positions {draws.rule!r}, of fewer than two documents: "
            "give more sequences, or other positions"
        )


def _measure(
    model: TransformersModel,
    server: Server | None,
    label: str,
    some: Sequence[Item],
    sites: Sequence[ResidualSite],
    medians: torch.Tensor,
    runs: Sequence[Run],
    shared: Sequence[str],
    features: torch.Tensor | None,
) -> list[dict[str, Any]]:
    """Measure some sequences, here or in one job on a server."""
    if server is None:
        with torch.no_grad():
            here: list[dict[str, Any]] = measure_all(model, label, some, sites, medians, runs, shared, features)["measured"]
        return here

    def send(backend: Any) -> None:
        with torch.no_grad(), model.session(backend=backend):
            answer = save(measure_all(model, label, some, sites, medians, runs, shared, features))  # noqa: F841

    answer = labelled(run_job(server, model, send).get("answer"), label)
    measured: list[dict[str, Any]] = answer["measured"]
    predictions, sets = some[0][1].shape[1] - 1, len(some[0][4])
    bins = bins_of(predictions)
    wanted = (sets, len(runs), len(runs[0][0][2]), bins, 3), (sets, bins), (predictions,)
    if len(measured) != len(some) or any((one["sums"].shape, one["counts"].shape, one["losses"].shape) != wanted for one in measured):
        raise RemoteError("the answer does not hold what was asked for; nothing was kept")
    return measured


def _check_finite(sums: torch.Tensor, sequence: int, runs: Sequence[Run]) -> None:
    bad = torch.nonzero(~torch.isfinite(sums)).tolist()
    if bad:
        _, place, number, *_ = bad[0]
        pair = " and ".join(f"{source}:{target}" for source, target, _ in runs[place])
        raise ActivationError(f"{list(runs[place][0][2])[number]} at {pair} gives a loss that is not finite in sequence {sequence}")


def choose_sequences(blocks: TokenBlocks, count: int | None = None, split: str = "test") -> np.ndarray:
    """Row numbers of sequences to edit, int64 (count,), of documents of a split.

    Args:
        blocks: The text.
        count: How many; without a number `SEQUENCES`, or as many as there are.
        split: Of which documents.

    Raises:
        TextError: There are too few, or all come from one document, so that no interval can be given.
    """
    if count is None:
        there = blocks.count_full(split)
        count = min(SEQUENCES, there) if there >= 2 else SEQUENCES
    if count < 2:
        raise TextError(f"{count} sequences: an interval needs at least 2")
    rows = blocks.full_blocks(split, count)
    if len(np.unique(blocks.index[rows, 3])) < 2:
        raise TextError(f"all {count} {split} sequences come from one document: an interval needs more; give more text")
    return rows


def check_interventions(names: Sequence[str], controls: Iterable[str] = ()) -> None:
    """Refuse names of interventions that nobody knows.

    Args:
        names: The interventions.
        controls: Names of operators given as controls.

    Raises:
        OperatorError: One is unknown, or there are none.
    """
    known = {*INTERVENTIONS, *controls}
    if unknown := [name for name in names if name not in known and not is_rank(name)]:
        raise OperatorError(
            f"unknown intervention {unknown[0]!r}{did_you_mean(unknown[0], known)}; known are {', '.join([*INTERVENTIONS, 'rank_R'])}"
        )
    if not names:
        raise OperatorError(f"nothing to do: give at least one intervention of {', '.join([*INTERVENTIONS, 'rank_R'])}")


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
