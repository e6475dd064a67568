"""Choosing latents worth judging: the paper's score, and one without its flaws; what each latent does to the loss (METHODS §6.5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nnato.accumulation import default_corpus, tokenize
from nnato.corpus import Corpus, TokenBlocks
from nnato.dictionaries import Dictionary
from nnato.errors import DictionaryError, FileFormatError
from nnato.feature_traits import ActiveTokens, PublishedTraits, Traits, read_tokens, vocabulary_focus
from nnato.lens_training import head
from nnato.losses import token_losses
from nnato.models import describe
from nnato.reduction import capture, classify
from nnato.sites import ResidualSite
from nnato.statistics import Progress
from nnato.storage import provenance, read_any_json
from nnato.trace import ATOTrace, save

if TYPE_CHECKING:
    from nnato.nnsight_setup import TransformersModel

KIND = "feature-selection"
PRESETS = ("corrected", "paper")
FIRST = {"coherence": 0.40, "focus": 0.35, "redundancy": -0.15, "dead": -0.10}
"""Weights by which candidates for the causal term are chosen, as published."""
FINAL = {"coherence": 0.35, "focus": 0.25, "causal": 0.30, "redundancy": -0.07, "dead": -0.03}
"""Weights of the score, as published."""
CANDIDATES, FEWEST_CANDIDATES = 0.15, 32
"""Share of latents whose causal term is measured, and how many at least, as published."""
PROMPTS = (
    "The capital of France is",
    "In Python, a list comprehension",
    "The derivative of x^2 is",
    "Translate to Spanish: good morning",
)
"""On which the paper measures its causal term."""
FEWEST_SEQUENCES = 3
"""With fewer sequences in which it is active, nothing is said of what a latent does to the loss."""
ROWS = 32
"""Edited copies of a sequence in one forward pass."""


@dataclass(frozen=True)
class Causal:
    """What is lost without a latent's part of the residual where it is active, in nats per token; float64 (candidates,) each.

    Attributes:
        delta: Mean over sequences; NaN with fewer than `FEWEST_SEQUENCES` of them.
        error: Its standard error.
        sequences: Of how many documents one was read.
    """

    delta: torch.Tensor
    error: torch.Tensor
    sequences: torch.Tensor

    @property
    def shrunk(self) -> torch.Tensor:
        """`Δ · Δ² / (Δ² + error²)`: an estimate that is mostly noise becomes small."""
        square = self.delta.square()
        whole = square + self.error.square()
        return torch.where(whole > 0, self.delta * square / whole, self.delta)


@dataclass(frozen=True)
class Selection:
    """Latents with the highest score, best first, and how they came by it.

    Attributes:
        features: int64 (selected,).
        score: float64 (latents,); NaN for those that were out of the running.
        terms: Of the score, by name, float64 (latents,) each, as measured: `coherence`, `focus`, `redundancy`, `dead`, `causal`.
        rate: Share of tokens in which each latent is active, float64 (latents,).
        about: Where it is from, in JSON.
    """

    features: torch.Tensor
    score: torch.Tensor = field(repr=False)
    terms: Mapping[str, torch.Tensor] = field(repr=False)
    rate: torch.Tensor = field(repr=False)
    about: Mapping[str, Any] = field(repr=False)

    def row(self, feature: int) -> dict[str, Any]:
        """One latent's terms, in JSON."""
        terms = {name: float(values[feature]) for name, values in self.terms.items()}
        return {"feature": feature, "score": float(self.score[feature]), **terms}

    def to_json(self) -> dict[str, Any]:
        """All of it, in JSON; `read_features` reads it again."""
        known = {name: int((~torch.isnan(values)).sum()) for name, values in {**self.terms, "score": self.score}.items()}
        return {
            "kind": KIND,
            "features": self.features.tolist(),
            "terms": [self.row(int(feature)) for feature in self.features],
            "known": known,
            "rate": self.rate.tolist(),
            **self.about,
        }


def select_features(
    model: TransformersModel,
    dictionary: Dictionary,
    site: int | str | ResidualSite,
    corpus: Corpus | TokenBlocks | None = None,
    *,
    preset: str = "corrected",
    top: float = 0.05,
    sequences: int = 4,
    positions: int = 64,
    seed: int = 0,
    split: str = "train",
    batch_size: int = 8,
    file: Path | None = None,
    progress: Progress | None = None,
) -> Selection:
    """Choose the latents that score highest: coherent tokens, focus on few words, a causal effect; neither redundant nor dead.

    Each term is scaled to 0 … 1 over the latents. Under `corrected`, a latent has a score if it is active often enough for its coherence
    to be known, is among the 15 % best without the causal term, and is active in enough sequences for that; nothing is taken for zero.

    Args:
        model: The model.
        dictionary: A sparse autoencoder of the site.
        site: Where.
        corpus: The text, tokenised already or not; by default the embedded one.
        preset: `corrected`, or `paper` as the authors' code does it.
        top: Share of all latents to keep.
        sequences: For the causal term, so many sequences of each candidate, of different documents. Under `paper` it is four prompts.
        positions: At most so many tokens of each of these.
        seed: Of the positions drawn under `paper`.
        split: Which documents.
        batch_size: Token blocks per forward pass.
        file: Where to keep checkpoints of the pass.
        progress: Told of each stage.

    Raises:
        DictionaryError: It belongs to another model or site, or an option is out of range.
        TextError: The text cannot be read or is too short.
        ActivationError: A residual is not finite.
    """
    if preset not in PRESETS or not 0 < top <= 1 or sequences < FEWEST_SEQUENCES or positions < 2:
        raise DictionaryError(
            f"preset {preset!r}, top {top}, {sequences} sequences of {positions} positions: presets are {', '.join(PRESETS)}, top is a "
            f"share of latents, and at least {FEWEST_SEQUENCES} sequences of 2 positions are needed"
        )
    info = describe(model)
    place = ResidualSite.parse(site, info.blocks)
    dictionary.check_fits(info.fingerprint(), place)
    dictionary = dictionary.to(next(model._module.parameters()).device)
    every = tokenize(model, corpus or default_corpus(info), progress)
    blocks = every.only(split)
    statistic = (ActiveTokens if preset == "corrected" else PublishedTraits)(dictionary, place)
    about = read_tokens(
        model,
        info,
        every,
        statistic,
        KIND,
        split=split,
        extra={"preset": preset, "seed": seed},
        batch_size=batch_size,
        file=file,
        progress=progress,
    )
    traits: Traits = statistic.result()
    focus = vocabulary_focus(dictionary.directions.nan_to_num(0.0), model._module.get_output_embeddings().weight)
    terms = {"coherence": traits.coherence, "focus": focus, "redundancy": traits.redundancy, "dead": -traits.rate}
    first = weighted(terms, FIRST)
    count = min(max(FEWEST_CANDIDATES, int(dictionary.latents * CANDIDATES)), int((~torch.isnan(first)).sum()))
    candidates = best(first, count)
    causal = torch.zeros_like(first) if preset == "paper" else torch.full_like(first, float("nan"))
    if preset == "paper":
        effects = prompt_effects(model, dictionary, place, candidates, progress).clamp(min=0)
        causal[candidates] = effects
    else:
        medians = torch.tensor([about["medians"][str(place)]], dtype=torch.float64)
        causal[candidates] = causal_effects(model, dictionary, place, blocks, candidates, medians, sequences, positions, progress).shrunk
    terms["causal"] = causal
    score = weighted(terms, FINAL)
    kept = min(max(1, int(dictionary.latents * top)), int((~torch.isnan(score)).sum()))
    return Selection(
        features=best(score, kept),
        score=score,
        terms=terms,
        rate=traits.rate,
        about={
            "preset": preset,
            "weights": FINAL,
            "candidates": len(candidates),
            "latents": dictionary.latents,
            "top": top,
            "split": split,
            "tokens": traits.tokens,
            "seed": seed,
            "site": place.key,
            "sae": dictionary.fingerprint(),
            "model": info.fingerprint(),
            "text": every.fingerprint,
            "provenance": provenance(),
        },
    )


def scaled(values: torch.Tensor) -> torch.Tensor:
    """Values moved and scaled to 0 … 1, as the paper's code does; NaN takes no part. float64 (latents,)."""
    known = values[~torch.isnan(values)]
    if not len(known) or float(known.max() - known.min()) < 1e-8:
        return values * 0
    return (values - known.min()) / (known.max() - known.min() + 1e-8)


def weighted(terms: Mapping[str, torch.Tensor], weights: Mapping[str, float]) -> torch.Tensor:
    """Sum of scaled terms, float64 (latents,); NaN where one of them is."""
    return torch.stack([weight * scaled(terms[name]) for name, weight in weights.items()]).sum(0)


def best(score: torch.Tensor, count: int) -> torch.Tensor:
    """The latents with the highest scores, best first, of equal ones the lower number first; int64 (count,)."""
    return torch.argsort(score.nan_to_num(-torch.inf), descending=True, stable=True)[:count]


# ---- what is lost without a latent ------------------------------------------------------------------------------------------


def causal_effects(
    model: TransformersModel,
    dictionary: Dictionary,
    site: ResidualSite,
    blocks: TokenBlocks,
    candidates: torch.Tensor,
    medians: torch.Tensor,
    sequences: int,
    positions: int,
    progress: Progress | None = None,
) -> Causal:
    """Take a latent's part out of the residual at all ordinary tokens of a sequence where it is active; what that does to the loss there.

    A sequence is the beginning of a token block. Sequences are gone through in one order; each is edited for all candidates that are
    active in it and still need sequences, several in one pass, one to a row.

    Args:
        model: The model.
        dictionary: A dictionary of the site.
        site: Where.
        blocks: The text.
        candidates: Latents, int64 (candidates,).
        medians: Median norm at the site, float64 (1,), which decides what is a sink.
        sequences: For each candidate, of different documents.
        positions: Tokens of a sequence, at most.
        progress: Told of each sequence.
    """
    sums = torch.zeros(3, len(candidates), dtype=torch.float64)  # n, Σ Δ, Σ Δ²
    read: list[set[int]] = [set() for _ in range(len(candidates))]
    whole = sequences * len(candidates)
    for rows in blocks.plan(1):
        if progress is not None:
            progress("taking latents out", int(sums[0].sum()), whole)
        missing = sums[0] < sequences
        if not bool(missing.any()):
            break
        tokens = blocks.batch(rows)
        ids, special, document = tokens.ids[:, : positions + 1], tokens.special[:, : positions + 1], int(tokens.documents[0])
        y = capture(model, ids, [site])
        ordinary = classify(y, torch.ones_like(special), special, medians)[0][0]
        ordinary[-1] = False  # nothing is known of what follows
        activations = dictionary.encode(y[0, 0], candidates.to(y.device)) * ordinary[:, None]
        active = (activations > 0).any(0).cpu()
        wanted = [one for one in torch.nonzero(active & missing).flatten().tolist() if document not in read[one]]
        if not wanted:
            continue
        changes = _changes(model, dictionary, site, ids, y[0, 0], activations[:, wanted], candidates[wanted])
        for one, change in zip(wanted, changes.tolist(), strict=True):
            sums[:, one] += torch.tensor([1.0, change, change**2], dtype=torch.float64)
            read[one].add(document)
    if progress is not None:
        progress("taking latents out", whole, whole)
    n, total, squares = sums
    known = torch.where(n >= FEWEST_SEQUENCES, n, float("nan"))
    delta = total / known
    error = ((squares / known - delta.square()).clamp(min=0) / (known - 1)).sqrt()
    return Causal(delta, error, n)


def prompt_effects(
    model: TransformersModel, dictionary: Dictionary, site: ResidualSite, candidates: torch.Tensor, progress: Progress | None = None
) -> torch.Tensor:
    """The paper's causal term before negative ones become zero: Δ of the mean loss of four prompts, latents taken out at all tokens.

    As there, a latent is active where its pre-activation is positive, whatever its threshold.

    Args:
        model: The model.
        dictionary: A dictionary of the site.
        site: Where.
        candidates: Latents, int64 (candidates,).
        progress: Told of each prompt.

    Returns:
        float64 (candidates,).
    """
    total = torch.zeros(len(candidates), dtype=torch.float64)
    for number, prompt in enumerate(PROMPTS):
        if progress is not None:
            progress("taking latents out of prompts", number, len(PROMPTS))
        ids = torch.tensor([model.tokenizer(prompt).input_ids])
        y = capture(model, ids, [site])[0, 0]
        activations = dictionary.pre_activations(y, candidates.to(y.device)).relu()
        wanted = torch.nonzero((activations > 0).any(0)).flatten().cpu()
        change = _changes(model, dictionary, site, ids, y, activations[:, wanted.to(y.device)], candidates[wanted], everywhere=True)
        total[wanted] += change
    if progress is not None:
        progress("taking latents out of prompts", len(PROMPTS), len(PROMPTS))
    return total / len(PROMPTS)


def _changes(
    model: TransformersModel,
    dictionary: Dictionary,
    site: ResidualSite,
    ids: torch.Tensor,
    y: torch.Tensor,
    activations: torch.Tensor,
    latents: torch.Tensor,
    everywhere: bool = False,
) -> torch.Tensor:
    """Δ of the mean loss at tokens where latents are active, or everywhere, when each is taken out by itself; float64 (latents,).

    Args:
        model: The model.
        dictionary: A dictionary of the site.
        site: Where.
        ids: int64 (1, positions).
        y: Residuals at the site, (positions, d_model).
        activations: Float (positions, latents).
        latents: int64 (latents,).
        everywhere: Whether to take the mean over all predictions.
    """
    targets = ids[0, 1:].to(y.device)
    counted = torch.ones_like(activations[:-1]) if everywhere else (activations[:-1] > 0)
    before = _losses(model, site, ids, y[None], torch.ones(1, len(targets), dtype=torch.bool, device=y.device), targets)[0]
    found = []
    for some in torch.split(torch.arange(len(latents), device=y.device), ROWS):
        values = y.repeat(len(some), 1, 1)
        rows, places = torch.nonzero(activations[:, some].T, as_tuple=True)
        strengths = activations[places, some[rows]]
        values[rows, places] -= dictionary.contributions(strengths, latents.to(y.device)[some[rows]], y[places]).to(values)
        at = counted[:, some].T.bool()
        after = _losses(model, site, ids, values, at, targets)
        found.append(torch.where(at, after - before, 0.0).sum(1) / at.sum(1))
    return torch.cat(found).cpu() if found else torch.zeros(0, dtype=torch.float64)


def _losses(
    model: TransformersModel, site: ResidualSite, ids: torch.Tensor, values: torch.Tensor, at: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Losses at some places when the residuals of a site are given, float64 (rows, positions - 1), zero elsewhere.

    Only the last residual of the places asked for goes through the language-model head, which costs as much as many blocks.
    """
    with torch.no_grad(), ATOTrace(model, input_ids=ids.expand(len(values), -1), use_cache=False, logits_to_keep=1) as t:
        if site < 0:
            t.patch(site, values)
        else:
            t.resume(site, values)
        last = save(t.residual(t.n_blocks - 1))
        t.skip_head()
    rows, places = torch.nonzero(at, as_tuple=True)
    losses = torch.zeros(at.shape, dtype=torch.float64, device=at.device)
    for part in torch.split(torch.arange(len(rows), device=rows.device), ids.shape[1]):
        with torch.no_grad():
            logits = head(model, last[rows[part], places[part]])
        losses[rows[part], places[part]] = token_losses(logits, targets[places[part]])[0].double()
    return losses


# ---- files ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """Latents that were chosen in a file.

    Attributes:
        features: int64 (features,), in its order.
        rate: Of all latents, float64 (latents,); None if the file does not say.
        about: What else it says.
    """

    features: torch.Tensor
    rate: torch.Tensor | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def check_fits(self, dictionary: Dictionary) -> None:
        """Refuse a selection from another dictionary.

        Raises:
            DictionaryError: It is.
        """
        if "digest" in self.about.get("sae", {}) and self.about["sae"]["digest"] != dictionary.fingerprint()["digest"]:
            raise DictionaryError(
                f"these features were selected from another SAE, {self.about['sae'].get('source')!r}: select them from this one"
            )
        if self.rate is not None and len(self.rate) != dictionary.latents:
            raise DictionaryError(f"these features were selected among {len(self.rate)} latents; {dictionary} has {dictionary.latents}")


def read_features(path: str | Path) -> Chosen:
    """Latents from a JSON file: a list of numbers, or an object with such a list as `features`, as `nnato features select` writes.

    Raises:
        FileFormatError: No such file, or it holds something else.
    """
    path = Path(path).expanduser()
    found = read_any_json(path)
    record: dict[str, Any] = found if isinstance(found, dict) else {"features": found}
    numbers, rates, sae = record.get("features"), record.get("rate"), record.get("sae", {})
    sound = isinstance(numbers, list) and numbers and all(type(number) is int and 0 <= number < 2**31 for number in numbers)
    fine = rates is None or (isinstance(rates, list) and all(type(rate) in (int, float) and 0 <= rate <= 1 for rate in rates))
    if not sound or not fine or not isinstance(sae, dict):
        raise FileFormatError(f"{path} holds no list of features (numbers from 0 on), neither by itself nor under the name features")
    about = {name: value for name, value in record.items() if name not in ("features", "rate", "terms")}
    return Chosen(torch.tensor(numbers), None if rates is None else torch.tensor(np.array(rates, dtype=np.float64)), about)
