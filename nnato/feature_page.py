"""One feature: what is carried to it from each source, where it is active, and a page of that (one file, no network, no script)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nnato.accumulation import Accumulated
from nnato.active_scores import REASONS
from nnato.corpus import TokenBlocks
from nnato.dictionaries import Dictionary
from nnato.errors import DictionaryError
from nnato.feature_pass import feature_pass
from nnato.features import evaluate_features
from nnato.pages import write
from nnato.reduction import TokenClasses, capture
from nnato.sites import Pair, ResidualSite
from nnato.statistics import Progress
from nnato.storage import provenance
from nnato.top_examples import Example, Leaders, example_at

if TYPE_CHECKING:
    from nnato.nnsight_setup import TransformersModel


@dataclass(frozen=True)
class Feature:
    """One latent of a dictionary, with all that is known of it.

    Attributes:
        latent: The latent.
        site: Where.
        rows: By source, longest leap first: what `FeatureResult.row` gives, with `active`: scores of active tokens.
        reason: Why there are no scores of active tokens; empty if there are some.
        rate: Share of test tokens in which it is active.
        examples: Where it is most active in test documents.
        link: Its page on Neuronpedia, if it has one.
        about: Model, text, dictionary, in JSON.
    """

    latent: int
    site: ResidualSite
    rows: Sequence[dict[str, Any]]
    reason: str
    rate: float
    examples: Sequence[Example]
    link: str | None
    about: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """All of it, in JSON."""
        return {
            "feature": self.latent,
            "site": self.site.key,
            "rate": self.rate,
            "missing": self.reason or None,
            "link": self.link,
            "sources": list(self.rows),
            "examples": [one.to_json() for one in self.examples],
            **self.about,
        }


def describe_feature(
    model: TransformersModel,
    blocks: TokenBlocks,
    accumulated: Accumulated,
    dictionary: Dictionary,
    latent: int,
    pairs: Sequence[Pair],
    *,
    examples: int = 8,
    force: bool = False,
    progress: Progress | None = None,
) -> Feature:
    """Judge one latent for every source, and find where it is most active in test documents.

    Its verdicts are its own: nothing is said here of false discoveries among many.

    Args:
        model: The model of the moments.
        blocks: Their text, tokenised.
        accumulated: What `accumulate` or `load_moments` returned.
        dictionary: A dictionary of the target.
        latent: Which.
        pairs: (source, target) with one target.
        examples: How many contexts to show.
        force: Go on with fewer than 5 effective tokens per dimension.
        progress: Told of each stage.

    Raises:
        DictionaryError: There is no such latent, it belongs to another model or site, or no example was asked for.
        MomentsError: The moments lack a pair, or hold too few tokens.
    """
    if examples < 1:
        raise DictionaryError(f"{examples} examples: ask for at least one")
    results = evaluate_features(accumulated, dictionary, pairs, [latent], force=force, progress=progress)
    passed = feature_pass(model, blocks, dictionary, [one.operator for one in results], [latent], sample=1, progress=progress)
    reason = REASONS[int(passed.reasons()[0])]
    rows = []
    for result, one in zip(results, passed.scores, strict=True):
        active = {
            "r2": one.active.r2()[0].to_json(),
            "pearson": float(one.active.pearson()[0]),
            "latent_r2": float(one.latent.r2().value[0]),
            "precision": float(one.precision[0]),
            "recall": float(one.recall[0]),
            "auc": float(one.auc[0]),
        }
        rows.append(result.row(0) | {"leap": result.leap, "active": None if reason else active})
    site = pairs[0][1]
    medians = torch.tensor([accumulated.medians[str(site)]], dtype=torch.float64)
    return Feature(
        latent=latent,
        site=site,
        rows=rows,
        reason=reason,
        rate=float(passed.rate[0]),
        examples=_examples(model, blocks.only("test"), dictionary, site, latent, medians, examples, progress),
        link=dictionary.link(latent),
        about={"sae": dictionary.fingerprint(), "model": accumulated.model, "text": accumulated.text, "provenance": provenance()},
    )


def _examples(
    model: TransformersModel,
    blocks: TokenBlocks,
    dictionary: Dictionary,
    site: ResidualSite,
    latent: int,
    medians: torch.Tensor,
    count: int,
    progress: Progress | None,
) -> list[Example]:
    """The contexts in which a latent is most active."""
    leaders, classes, plan = Leaders(1, count), TokenClasses(medians), blocks.plan(8)
    which = torch.tensor([latent])
    for number, rows in enumerate(plan):
        if progress is not None:
            progress("looking for examples", number, len(plan))
        tokens = blocks.batch(rows)
        residuals = capture(model, tokens.ids, [site])
        ordinary = classes.ordinary(tokens.ids, tokens.mask, tokens.special, residuals)
        values = dictionary.encode(residuals[0][ordinary], which.to(residuals.device))[:, 0].cpu()
        at = torch.nonzero(ordinary.cpu())
        place = torch.as_tensor(rows)[at[:, 0]] * blocks.context + at[:, 1]
        on = values > 0
        leaders.add(torch.zeros(int(on.sum()), dtype=torch.int64), values[on], place[on])
    if progress is not None:
        progress("looking for examples", len(plan), len(plan))
    entries = zip(leaders.values[0].tolist(), leaders.places[0].tolist(), strict=True)
    return [example_at(blocks, model.tokenizer, latent, site, value, place) for value, place in entries if place >= 0]


def write_feature_page(feature: Feature, path: str | Path) -> Path:
    """Write a page of one feature: one file that needs no network and no script.

    Args:
        feature: What `describe_feature` returned.
        path: Where to write.

    Raises:
        OutputError: It cannot be written.
    """
    filters = {"shown": shown, "at": lambda value: f"{100 * min(max(value, 0.0), 1.0):.2f}"}
    return write(path, "feature.html", filters, feature=feature, name=f"Feature {feature.site}:{feature.latent}")


def shown(value: float | dict[str, float] | None, digits: int = 3) -> str:
    """A number or an interval as text; a dash for what is not known."""
    if isinstance(value, dict):
        ends = f" [{value['low']:.2f}, {value['high']:.2f}]" if value["low"] == value["low"] else ""
        return shown(value["value"], digits) + ends
    return "–" if value is None or value != value else f"{value:.{digits}f}"
