"""How well a lens predicts what the model predicts, and training it by that: KL(model ‖ lens), in nats per token (arXiv 2303.08112)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from nnato.accumulation import tokenize
from nnato.corpus import Corpus, TokenBlocks
from nnato.errors import OperatorError
from nnato.intervals import Interval, ratio_spread
from nnato.lens import Lens
from nnato.models import describe
from nnato.operators import TransportOperator
from nnato.reduction import classify, stacked
from nnato.sites import ResidualSite
from nnato.statistics import Progress
from nnato.trace import ATOTrace, save

if TYPE_CHECKING:
    from nnato.nnsight_setup import TransformersModel

CELLS = 1 << 25
"""Logits held at once."""


@dataclass(frozen=True)
class LensScore:
    """How well a lens predicts the model's predictions from one site.

    Attributes:
        site: Where it reads.
        kl: KL(model ‖ lens), nats per token, with a 95 % interval over documents.
        agreement: Share of tokens at which both find the same next token most likely.
    """

    site: ResidualSite
    kl: Interval
    agreement: float


def head(model: TransformersModel, rows: torch.Tensor) -> torch.Tensor:
    """What the model predicts when the output of its last block is given: final norm, head and soft-cap.

    Args:
        model: The model.
        rows: Float (n, d_model).

    Returns:
        Logits, float32 (n, vocabulary), with a gradient if rows have one.
    """
    ids = torch.zeros(1, len(rows), dtype=torch.int64)
    with ATOTrace(model, input_ids=ids, use_cache=False) as t:
        t.resume(t.n_blocks - 1, rows[None])
        logits = save(t.logits)
    found: torch.Tensor = logits[0].float()
    return found


def divergence(clean: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(clean ‖ other) of each row of logits, float (n, vocabulary); float (n,), in nats."""
    expected, found = torch.log_softmax(clean, -1), torch.log_softmax(other, -1)
    return (expected.exp() * (expected - found)).sum(-1)


def evaluate_lens(
    model: TransformersModel,
    lenses: Mapping[str, Lens],
    corpus: Corpus | TokenBlocks,
    *,
    sites: Sequence[int | str | ResidualSite] | None = None,
    sequences: int = 16,
    split: str = "test",
    progress: Progress | None = None,
) -> dict[str, list[LensScore]]:
    """KL from the model's own predictions to those of lenses, site by site, at ordinary tokens of the same sequences.

    Args:
        model: The model.
        lenses: The lenses by name.
        corpus: The text, tokenised already or not.
        sites: Where; by default all that all lenses know, the last block included.
        sequences: Full blocks to read, of as many documents as possible.
        split: Which documents.
        progress: Told of each sequence.

    Raises:
        OperatorError: A lens is of another model.
        TextError: There are too few full blocks.
    """
    info = describe(model)
    known = set.intersection(*(set(lens.sites) for lens in lenses.values()))
    chosen = sorted(known if sites is None else {ResidualSite.parse(site, info.blocks) for site in sites})
    for lens in lenses.values():
        lens.check_fits(info, chosen)
    blocks = tokenize(model, corpus, progress)
    sums = torch.zeros(len(lenses), len(chosen), sequences, 2, dtype=torch.float64)
    counts = torch.zeros(sequences, dtype=torch.float64)
    for number, (residuals, logits) in enumerate(_passes(model, blocks, chosen, split, sequences)):
        if progress is not None:
            progress("reading through lenses", number, sequences)
        counts[number] = len(logits)
        for which, lens in enumerate(lenses.values()):
            for at, site in enumerate(chosen):
                for part in torch.split(torch.arange(len(logits)), max(CELLS // logits.shape[-1], 1)):
                    with torch.no_grad():
                        clean, seen = logits[part], head(model, lens(residuals[at, part], site))
                    sums[which, at, number, 0] += float(divergence(clean, seen).double().sum())
                    sums[which, at, number, 1] += int((clean.argmax(-1) == seen.argmax(-1)).sum())
    if progress is not None:
        progress("reading through lenses", sequences, sequences)
    found = {}
    for which, name in enumerate(lenses):
        agreement = (sums[which, :, :, 1].sum(1) / counts.sum()).tolist()
        found[name] = [LensScore(site, _mean(sums[which, at, :, 0], counts), agreement[at]) for at, site in enumerate(chosen)]
    return found


def _mean(totals: torch.Tensor, counts: torch.Tensor) -> Interval:
    """Mean per token over sequences, with its interval."""
    value, spread = float(totals.sum() / counts.sum()), ratio_spread(totals, counts)
    return Interval(value) if spread is None else spread.around(value)


def _passes(
    model: TransformersModel, blocks: TokenBlocks, sites: Sequence[ResidualSite], split: str, sequences: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of full blocks the residuals, (sites, n, d_model), and logits, float32 (n, vocabulary), of ordinary tokens."""
    medians = None
    for row in blocks.full_blocks(split, sequences):
        tokens = blocks.batch([row])
        with torch.no_grad(), ATOTrace(model, input_ids=tokens.ids, use_cache=False) as t:
            residuals = save(stacked(model, t, sites))
            logits = save(t.logits)
        ordinary, _, medians = classify(residuals, tokens.mask, tokens.special, medians)
        yield residuals[:, ordinary], logits[ordinary].float()


def train_lens(
    model: TransformersModel,
    lens: Lens,
    corpus: Corpus | TokenBlocks,
    *,
    sites: Sequence[int | str | ResidualSite] | None = None,
    steps: int = 200,
    tokens: int = 256,
    lr: float = 1e-4,
    validation: int = 8,
    checks: int = 5,
    seed: int = 0,
    progress: Progress | None = None,
) -> Lens:
    """Train translators by KL(model ‖ lens) with Adam, from where they are; a closed-form lens is a good place to start.

    On the way, validation documents are read several times. Of each translator, the state that did best there is kept, the one it started
    from included, so none does worse there than before.

    Args:
        model: The model.
        lens: Where to start.
        corpus: The text, tokenised already or not; training documents are trained on, in turn.
        sites: Which translators; by default all.
        steps: Steps of Adam; the rate falls linearly to zero.
        tokens: Tokens of a step, drawn from one sequence.
        lr: Adam's rate, in units of the deviations of input and output. A step can move an output by about the width of the residual
            stream times this.
        validation: Full blocks of validation documents that decide.
        checks: How often they do, at equal distances, the last time after the last step.
        seed: Of the draw.
        progress: Told of each step.

    Returns:
        The lens. Its details say at which sites it is better (`kl_improved`), and at which step each validation gave which KL
        (`kl_validation`).

    Raises:
        OperatorError: The lens is of another model, or there is nothing to train.
        TextError: There are too few full blocks.
    """
    info = describe(model)
    chosen = sorted(set(lens.translators) if sites is None else {ResidualSite.parse(site, info.blocks) for site in sites} - {lens.last})
    if not chosen or steps < 1 or tokens < 1 or checks < 1:
        raise OperatorError("nothing to train: give a site before the last block, at least one step of one token, and one check")
    lens.check_fits(info, chosen)
    blocks = tokenize(model, corpus, progress)
    best = _Best(model, blocks, chosen, validation, lens)
    due = {round(steps * check / checks) for check in range(1, checks + 1)}
    for step, learners in _trained(model, lens, blocks, chosen, steps, tokens, lr, seed):
        if progress is not None:
            progress("training the lens", step, steps)
        if step in due:
            now = {site: learner.result() for site, learner in zip(chosen, learners, strict=True)}
            best.consider(step, replace(lens, translators={**lens.translators, **now}))
    improved = [site.key for site in chosen if best.step[site]]
    details = {**lens.details, "kl_steps": steps, "kl_improved": improved, "kl_validation": best.history}
    return replace(best.lens, details=details)


class _Best:
    """The translators that did best on validation documents so far, site by site.

    Attributes:
        lens: With these translators.
        step: By site, after which step that was; 0 is the start.
        history: By site in text, pairs of step and KL.
    """

    def __init__(self, model: TransformersModel, blocks: TokenBlocks, sites: Sequence[ResidualSite], sequences: int, lens: Lens) -> None:
        self.model, self.blocks, self.sites, self.sequences = model, blocks, sites, sequences
        self.lens, self.step, self.kl = lens, dict.fromkeys(sites, 0), dict.fromkeys(sites, math.inf)
        self.history: dict[str, list[list[float]]] = {str(site): [] for site in sites}
        self.consider(0, lens)

    def consider(self, step: int, lens: Lens) -> None:
        """Take over what is better; a KL that is not finite never is."""
        found = evaluate_lens(self.model, {"": lens}, self.blocks, sites=self.sites, sequences=self.sequences, split="validation")[""]
        better = {one.site: lens.translators[one.site] for one in found if one.kl.value < self.kl[one.site]}
        for one in found:
            self.history[str(one.site)].append([step, one.kl.value])
            if one.site in better:
                self.step[one.site], self.kl[one.site] = step, one.kl.value
        self.lens = replace(self.lens, translators={**self.lens.translators, **better})


def _trained(
    model: TransformersModel,
    lens: Lens,
    blocks: TokenBlocks,
    sites: Sequence[ResidualSite],
    steps: int,
    tokens: int,
    lr: float,
    seed: int,
) -> Iterator[tuple[int, list[_Learner]]]:
    """After each step of Adam its number, from 1, and the learners of the sites."""
    rows = blocks.only("train").index
    available = max(int((rows[:, 1] == blocks.context).sum()), 1)
    generator = torch.Generator().manual_seed(seed)
    learners: list[_Learner] = []
    step = 0
    while step < steps:
        for residuals, logits in _passes(model, blocks, sites, "train", min(steps - step, available)):
            if not learners:
                learners = [_Learner(lens, site, x.float()) for site, x in zip(sites, residuals, strict=True)]
                optimizer = torch.optim.Adam([one for learner in learners for one in learner.parameters], lr=lr)
                schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-3, steps)
            part = torch.randperm(len(logits), generator=generator)[:tokens].to(logits.device)
            for learner, x in zip(learners, residuals, strict=True):
                divergence(logits[part], head(model, learner(x[part].float()))).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
            yield step, learners


class _Learner:
    """A translator on its way: what is learned is a change of it, in units of the deviations of its input and output."""

    def __init__(self, lens: Lens, site: ResidualSite, x: torch.Tensor) -> None:
        self.lens, self.site, self.old = lens, site, lens.translators[site]
        # One coordinate can be thousands of times larger than the rest: in raw units, no one rate suits them all.
        self.x_scale = x.std(0).clamp(min=1e-6)
        self.y_scale = lens(x, site).std(0).clamp(min=1e-6)
        self.change = torch.zeros(x.shape[1], x.shape[1], device=x.device, requires_grad=True)
        self.shift = torch.zeros(x.shape[1], device=x.device, requires_grad=True)
        self.parameters = (self.change, self.shift)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Float (n, d_model) in the coordinates of the last block."""
        centred = (x - self.old.source_mean.to(x)) / self.x_scale
        return self.lens(x, self.site) + (centred @ self.change + self.shift) * self.y_scale

    def result(self) -> TransportOperator:
        """The translator as it is now."""
        old = self.old
        change = (self.change.detach() / self.x_scale[:, None] * self.y_scale).to(old.weight)
        shift = (self.shift.detach() * self.y_scale).to(old.weight)
        return TransportOperator(self.site, self.lens.last, old.weight + change, old.source_mean, old.target_mean + shift, name="lens")
