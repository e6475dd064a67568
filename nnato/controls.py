"""What some interventions need besides an operator, from the moments that it was fitted on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from nnato.accumulation import Accumulated
from nnato.cca import NullPairs, canonical_correlations
from nnato.edits import FITTED_CONTROLS, is_rank
from nnato.errors import MomentsError, OperatorError
from nnato.fitting import fitted_baselines
from nnato.operators import TransportOperator
from nnato.regression import Regression
from nnato.selection import Method, Solver
from nnato.sites import Pair

KEPT = ("model", "text", "medians", "provenance", "tokens", "training_tokens", "selection_metric")
"""What a control has in common with the operator it goes with."""


def controls_of(accumulated: Accumulated, operators: Iterable[TransportOperator], names: Sequence[str]) -> list[TransportOperator]:
    """Operators to compare fitted ones with in an ablation: fitted on the same ordinary training tokens, named after the intervention.

    Args:
        accumulated: The moments that the operators were fitted on.
        operators: Ridge operators.
        names: `shuffled`, `shrunk_to_identity`, or `rank_R`: the reduced-rank ridge of rank R at the penalty of the operator.

    Raises:
        OperatorError: Another name, or an operator without a penalty to take over.
        MomentsError: The moments lack a pair, or shuffled pairs; or there is no such rank.
    """
    if unknown := [name for name in names if name not in FITTED_CONTROLS and not is_rank(name)]:
        raise OperatorError(f"{unknown[0]!r} is not fitted; from moments come {', '.join(FITTED_CONTROLS)} and rank_R")
    found = []
    for operator in operators:
        train, validation = (rows(accumulated, split, operator.pair) for split in ("train", "validation"))
        width = min(train.xy.shape)
        metric = operator.details.get("selection_metric", "variance_weighted")
        fitted: dict[str, TransportOperator] = {}
        if set(names) & set(FITTED_CONTROLS):
            plain, back = Solver(Method(metric=metric)), Solver(Method(metric=metric, shrink_to="identity"))
            fitted = fitted_baselines(operator.pair, train, validation, accumulated.moments.shuffled, plain, back)
        for name in names:
            details = {key: value for key, value in operator.details.items() if key in KEPT}
            if is_rank(name):
                rank, kappa = int(name[5:]), operator.details.get("kappa")
                if kappa is None or operator.details.get("penalty", "ridge") != "ridge":
                    raise OperatorError(f"operator {operator.source}:{operator.target} has no ridge penalty, which {name} would take over")
                if not 1 <= rank <= width:
                    raise MomentsError(f"rank {rank}: choose from 1 to {width}")
                solution = Solver(Method(metric=metric, rank=rank, kappas=(kappa,))).solve(train, validation)
                details |= {"kappa": kappa, "alpha": solution.alpha, "rank": rank}
                made = TransportOperator(*operator.pair, solution.weight, train.x_mean, train.y_mean, name, details)
            elif name in fitted:
                made = replace(fitted[name], name=name, details=details)
            else:
                raise MomentsError("these moments hold no shuffled pairs, which the intervention shuffled needs: accumulate again")
            found.append(made)
    return found


def subspaces_of(accumulated: Accumulated, pairs: Iterable[Pair], force: bool = False) -> dict[Pair, tuple[torch.Tensor, torch.Tensor]]:
    """Factors of the projector onto the Linear Transport Subspace of some pairs, float64 (d_model, r) and (r, d_model), for `ablate`.

    Args:
        accumulated: The moments.
        pairs: (source, target) pairs.
        force: As in `canonical_correlations`.

    Raises:
        MomentsError: The moments lack a pair, or hold too few tokens; or nothing is transported.
    """
    found = {}
    for pair in pairs:
        shuffled = accumulated.moments.shuffled
        null = NullPairs(shuffled.n, shuffled.scatter_of(*pair)) if shuffled.n else None
        correlations = canonical_correlations(rows(accumulated, "train", pair), null=null, force=force)
        kept = slice(correlations.spikes)
        if not correlations.spikes:
            raise MomentsError(f"no canonical correlation of {pair[0]}:{pair[1]} is above the noise: there is no transport subspace")
        found[pair] = correlations.y_directions[:, kept], correlations.y_patterns[:, kept].T
    return found


def rows(accumulated: Accumulated, split: str, pair: Pair) -> Regression:
    """The ordinary rows of a pair in a split.

    Raises:
        MomentsError: The moments lack the pair, or the split holds too few tokens.
    """
    held = accumulated.moments.of(split, "ordinary", [pair])
    if held.n < 2:
        raise MomentsError(f"the {split} split holds {held.n} ordinary token: accumulate more text")
    return Regression.of(held, pair)
