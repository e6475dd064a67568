"""Per-feature scores from moments: how much of each direction of the target an operator predicts, and how much any could (METHODS §6.1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from nnato.accumulation import Accumulated
from nnato.cca import canonical_correlations, direction_ceilings
from nnato.dictionaries import Dictionary
from nnato.efficiency import PairRows
from nnato.errors import DictionaryError
from nnato.metrics import error_matrix
from nnato.operators import TransportOperator, identity
from nnato.regression import Regression
from nnato.selection import Method, Solver
from nnato.sites import Pair, make_pair
from nnato.statistics import Progress
from nnato.storage import provenance
from nnato.sums import Estimates, PairSums, jackknifed, quantiles, share
from nnato.verdicts import Thresholds, Verdicts, judge, relative

CHUNK = 2**23
"""Numbers of a product of directions and matrices made at once (64 MB)."""


@dataclass(frozen=True)
class DirectionScores:
    """What operators do to some directions of one target, over all ordinary test tokens; float64 (directions,) everywhere.

    Attributes:
        r2: Held-out R² by map: `transport`, `identity_shift`, `shuffled` (fitted to unrelated documents; missing without such pairs).
        over_null: R² of the operator above that of `shuffled`.
        skill: `1 - SSE / SSE(identity_shift)`.
        ceiling: What the best linear map could explain, debiased, with errors over training documents (METHODS §5.4).
        ceiling_in_sample: The same before that.
        ceiling_null: That of unrelated documents: noise, and what position alone predicts.
        membership: Share of the variance that lies in the Linear Transport Subspace.
        sums: Six sums of the true and predicted number, about the training mean, one fold.
        mean: The training mean.
    """

    r2: Mapping[str, Estimates]
    over_null: Estimates
    skill: Estimates
    ceiling: Estimates
    ceiling_in_sample: torch.Tensor
    ceiling_null: torch.Tensor
    membership: torch.Tensor
    sums: PairSums = field(repr=False)
    mean: torch.Tensor = field(repr=False)

    def take(self, chosen: torch.Tensor) -> DirectionScores:
        """Of some directions, int64 (chosen,)."""
        found: dict[str, Any] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Mapping):
                found[one.name] = {name: _take(estimates, chosen) for name, estimates in value.items()}
            elif isinstance(value, Estimates):
                found[one.name] = _take(value, chosen)
            else:
                found[one.name] = value.take(chosen) if isinstance(value, PairSums) else value[chosen]
        return DirectionScores(**found)


@dataclass(frozen=True)
class FeatureResult:
    """One operator judged by the features of a dictionary at its target.

    Attributes:
        operator: The fitted map.
        shuffled: The one fitted to unrelated documents, if there are such pairs.
        features: Latents of the dictionary, int64 (features,).
        scores: Of their decoder directions.
        random: Of as many random directions as were asked for: the control.
        subspace: Dimensions of the Linear Transport Subspace, relative to all: the membership of a random direction.
        thresholds: Of the verdicts.
        verdicts: One per feature.
        relative: R² relative to the ceiling.
    """

    operator: TransportOperator
    shuffled: TransportOperator | None
    features: torch.Tensor
    scores: DirectionScores
    random: DirectionScores
    subspace: float
    thresholds: Thresholds
    verdicts: Verdicts
    relative: Estimates

    @property
    def pair(self) -> Pair:
        """(source, target)."""
        return self.operator.pair

    @property
    def leap(self) -> int:
        """Blocks between source and target."""
        return int(self.pair[1]) - int(self.pair[0])

    def only(self, places: torch.Tensor) -> FeatureResult:
        """Judged by some of the features: false discoveries are counted among these. `places`: int64, in `features`."""
        scores = self.scores.take(places)
        r2, ceiling = scores.r2["transport"], scores.ceiling
        return replace(
            self,
            features=self.features[places],
            scores=scores,
            verdicts=judge(r2, ceiling, scores.over_null, scores.r2["identity_shift"], self.thresholds),
            relative=_take(self.relative, places),
        )

    def summary(self, among: torch.Tensor | None = None) -> dict[str, Any]:
        """Quantiles of R² and ceiling and the verdicts, in JSON, with the random directions beside them.

        Args:
            among: bool (features,): only these; all by default.
        """
        kept = torch.ones(len(self.features), dtype=torch.bool) if among is None else among
        scores, random = self.scores, self.random
        return {
            "source": self.pair[0].key,
            "target": self.pair[1].key,
            "r2": {name: quantiles(one.value[kept]) for name, one in scores.r2.items()},
            "ceiling": quantiles(scores.ceiling.value[kept]),
            "relative": quantiles(self.relative.value[kept]),
            "skill": quantiles(scores.skill.value[kept]),
            "membership": quantiles(scores.membership[kept]),
            "membership_of_random": self.subspace,
            "verdicts": dict(self.verdicts.counts(kept)),
            "random_directions": {"r2": quantiles(random.r2["transport"].value), "ceiling": quantiles(random.ceiling.value)},
        }

    def row(self, place: int) -> dict[str, Any]:
        """All of one feature, in JSON.

        Args:
            place: Its place in `features`.
        """
        scores = self.scores
        one = scores.sums.take(torch.tensor([place])).moved(scores.mean[place : place + 1])
        return {
            "source": self.pair[0].key,
            "target": self.pair[1].key,
            "feature": int(self.features[place]),
            "verdict": self.verdicts.name(place),
            "r2": {name: estimates[place].to_json() for name, estimates in scores.r2.items()},
            "ceiling": scores.ceiling[place].to_json(),
            "ceiling_in_sample": float(scores.ceiling_in_sample[place]),
            "relative": self.relative[place].to_json(),
            "skill": scores.skill[place].to_json(),
            "membership": float(scores.membership[place]),
            "pearson": float(one.pearson()),
            "slope": float(one.slope()),
            "rms_ratio": float(one.rms_ratio()),
            "mean_ratio": float(one.mean_ratio()),
            "q": {name: float(getattr(self.verdicts, f"q_{name}")[place]) for name in ("transported", "synthesised", "null")},
        }


def evaluate_features(
    accumulated: Accumulated,
    dictionary: Dictionary,
    pairs: Iterable[tuple[int | str, int | str]],
    features: Sequence[int] | torch.Tensor | None = None,
    *,
    method: Method | None = None,
    thresholds: Thresholds | None = None,
    random: int = 512,
    seed: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> list[FeatureResult]:
    """Fit operators and judge them by the decoder directions of a dictionary, from moments alone: every feature at once.

    Args:
        accumulated: What `accumulate` or `load_moments` returned.
        dictionary: A sparse autoencoder of the target site.
        pairs: (source, target) pairs whose target is a site of the dictionary.
        features: Latents; all by default.
        method: How to fit and to choose; by default ridge, with the penalty that does best on validation documents.
        thresholds: Of the verdicts.
        random: How many random directions to judge beside them.
        seed: Of these.
        force: Go on with fewer than 5 effective tokens per dimension.
        progress: Told of each pair.

    Returns:
        One result per pair, sorted.

    Raises:
        DictionaryError: It belongs to another model or site, or has no such latent.
        MomentsError: The moments lack a pair, or hold too few tokens.
        SiteError: Not a pair.
    """
    chosen = tuple(sorted({make_pair(*pair) for pair in pairs}))
    latents = check_latents(dictionary, features)
    for _, target in chosen:
        dictionary.check_fits(accumulated.model, target)
    generator = torch.Generator().manual_seed(seed)
    control = torch.nn.functional.normalize(torch.randn(random, dictionary.d_model, generator=generator, dtype=torch.float64), dim=1)
    directions = torch.cat([dictionary.directions[latents].cpu(), control])
    results = []
    for number, pair in enumerate(chosen):
        if progress is not None:
            progress("scoring features", number, len(chosen))
        rows = PairRows.of(accumulated, pair)
        maps = fitted_maps(pair, rows, method or Method(), accumulated)
        scores, subspace = score_directions(directions.to(rows.validation.xx.device), rows, maps, force)
        results.append(_result(latents, maps, scores, subspace, thresholds or Thresholds()))
    if progress is not None:
        progress("scoring features", len(chosen), len(chosen))
    return results


def check_latents(dictionary: Dictionary, features: Sequence[int] | torch.Tensor | None) -> torch.Tensor:
    """Chosen latents as int64 (features,); all if none are chosen.

    Raises:
        DictionaryError: There is no such latent, or none at all.
    """
    if features is None:
        return torch.arange(dictionary.latents)
    latents = torch.as_tensor(features, dtype=torch.int64).cpu().flatten()
    if not len(latents) or int(latents.min()) < 0 or int(latents.max()) >= dictionary.latents or len(set(latents.tolist())) < len(latents):
        raise DictionaryError(f"{dictionary} has latents 0 … {dictionary.latents - 1}: choose some of them, each once")
    return latents


def _result(
    latents: torch.Tensor, maps: Mapping[str, TransportOperator], scores: DirectionScores, subspace: float, thresholds: Thresholds
) -> FeatureResult:
    mine = scores.take(torch.arange(len(latents)))
    return FeatureResult(
        operator=maps["transport"],
        shuffled=maps.get("shuffled"),
        features=latents,
        scores=mine,
        random=scores.take(torch.arange(len(latents), len(scores.mean))),
        subspace=subspace,
        thresholds=thresholds,
        verdicts=judge(mine.r2["transport"], mine.ceiling, mine.over_null, mine.r2["identity_shift"], thresholds),
        relative=relative(mine.r2["transport"], mine.ceiling, thresholds),
    )


def fitted_maps(pair: Pair, rows: PairRows, method: Method, accumulated: Accumulated | None = None) -> dict[str, TransportOperator]:
    """The operator of a pair and what it is compared with: `transport`, `identity_shift` and, where there are such pairs, `shuffled`.

    Args:
        pair: (source, target).
        rows: Its rows.
        method: How to fit and to choose.
        accumulated: Where the rows come from, for the operator's details.
    """
    train = Regression.merge(rows.folds)
    solver = Solver(method)
    folds = rows.folds if method.select == "kfold" else ()
    solution = solver.solve(train, rows.validation, folds)
    about = {"alpha": solution.alpha, "kappa": solution.kappa, "training_tokens": train.n, "tokens": "ordinary", "provenance": provenance()}
    if accumulated is not None:
        about |= {"model": accumulated.model, "text": accumulated.text, "medians": accumulated.medians}
    means = train.x_mean, train.y_mean
    maps = {
        "transport": TransportOperator(*pair, solution.weight, *means, "transport", about),
        "identity_shift": identity(pair, *means),
    }
    if rows.null is not None:
        null = train.with_cross(rows.null.xy * (train.n / rows.null.n))
        weight = Solver(replace(method, select="validation")).solve(null, rows.validation).weight
        maps["shuffled"] = TransportOperator(*pair, weight, *means, "shuffled", about)
    return maps


def score_directions(
    directions: torch.Tensor, rows: PairRows, maps: Mapping[str, TransportOperator], force: bool = False
) -> tuple[DirectionScores, float]:
    """Scores of directions of the target of one pair: a pure function of its moments.

    Args:
        directions: float64 (directions, d_y).
        rows: Rows of the pair.
        maps: What `fitted_maps` returned, or others of this pair by the same names.
        force: Go on with fewer than 5 effective tokens per dimension.

    Returns:
        The scores, and the share of dimensions that lie in the Linear Transport Subspace.

    Raises:
        MomentsError: There are too few effective tokens, or sites do not vary.
    """
    train, test = Regression.merge(rows.folds), Regression.merge(rows.tests)
    correlations = canonical_correlations(train, null=rows.null, force=force)
    totals = deviations(directions, rows.tests)
    errors = {name: squared_errors(directions, one, rows.tests) for name, one in maps.items()}
    n = torch.tensor([float(fold.n) for fold in rows.tests], dtype=torch.float64, device=totals.device)[:, None].expand_as(totals)
    varies = totals.sum(0) > 1e-12 * (directions.square() @ test.yy.diagonal())
    r2 = {name: share(error, totals, n, varies) for name, error in errors.items()}
    null = errors.get("shuffled", torch.full_like(totals, float("nan")))
    ceilings = direction_ceilings(train, directions, rows.null)
    without = [direction_ceilings(train.without(fold), directions).in_sample for fold in rows.folds] if len(rows.folds) > 1 else []
    scores = DirectionScores(
        r2=r2,
        over_null=share(errors["transport"] - null + totals, totals, n, varies),
        skill=share(errors["transport"], errors["identity_shift"], n, varies),
        ceiling=jackknifed(ceilings.debiased, [(one - ceilings.null) / (1 - ceilings.null) for one in without]),
        ceiling_in_sample=ceilings.in_sample,
        ceiling_null=ceilings.null,
        membership=correlations.membership(directions, train.yy),
        sums=sums_of(directions, maps["transport"], test),
        mean=directions @ train.y_mean,
    )
    return scores, correlations.spikes / correlations.width


def quadratic_forms(directions: torch.Tensor, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """`d_f M d_fᵀ` for all directions and some matrices by one product.

    Args:
        directions: float64 (directions, d).
        matrices: float64 (d, d) each.

    Returns:
        float64 (matrices, directions).
    """
    side_by_side = torch.cat(list(matrices), dim=1)
    size = max(1, CHUNK // side_by_side.shape[1])
    found = []
    for some in torch.split(directions, size):
        products = (some @ side_by_side).view(len(some), len(matrices), -1)
        found.append(torch.einsum("fmd,fd->mf", products, some))
    return torch.cat(found, dim=1)


def squared_errors(directions: torch.Tensor, operator: TransportOperator, folds: Sequence[Regression]) -> torch.Tensor:
    """`Σ (d_f·y - d_f·ŷ)²` on held-out folds, float64 (folds, directions)."""
    return quadratic_forms(directions, [error_matrix(fold, operator.weight, operator.bias) for fold in folds]).clamp(min=0)


def deviations(directions: torch.Tensor, folds: Sequence[Regression]) -> torch.Tensor:
    """`Σ (d_f·y - mean)²` with the mean of all folds, float64 (folds, directions)."""
    n = torch.tensor([float(fold.n) for fold in folds], dtype=torch.float64, device=directions.device)[:, None]
    means = torch.stack([fold.y_mean for fold in folds])
    centred = (means - (n * means).sum(0) / n.sum()) @ directions.T
    return quadratic_forms(directions, [fold.yy for fold in folds]).clamp(min=0) + n * centred.square()


def sums_of(directions: torch.Tensor, operator: TransportOperator, held: Regression) -> PairSums:
    """Six sums of the true and the predicted number over held-out rows, about the training mean `d_f·ȳ`; one fold.

    Args:
        directions: float64 (directions, d_y).
        operator: The map.
        held: The rows.
    """
    weight, n = operator.weight, held.n
    a = (held.y_mean - operator.target_mean) @ directions.T
    b = (held.x_mean - operator.source_mean) @ weight @ directions.T
    aa, bb, ab = quadratic_forms(directions, [held.yy, weight.T @ held.xx @ weight, held.xy.T @ weight])
    count = torch.full_like(a, float(n))
    return PairSums(*(one[None] for one in (count, n * a, n * b, aa + n * a * a, bb + n * b * b, ab + n * a * b)))


def _take(estimates: Estimates, chosen: torch.Tensor) -> Estimates:
    return Estimates(estimates.value[chosen], estimates.error[chosen], estimates.degrees[chosen])
