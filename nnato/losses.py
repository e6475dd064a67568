"""What one sequence loses when residuals are replaced: the part of an ablation that runs where the model is.

Everything here is a plain function on torch and traces, so that it can run on a server where nnato is not installed; only numbers per
sequence come back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from nnato.blocks import find_blocks
from nnato.edits import pick
from nnato.reduction import classify
from nnato.sites import ResidualSite
from nnato.trace import ATOTrace, save

if TYPE_CHECKING:
    from nnato.nnsight_setup import TransformersModel

LOGIT_BYTES = 3 << 29
"""Logits of edited rows held at once; decides how many interventions share a forward pass."""

Maps = Mapping[str, Callable[[torch.Tensor], torch.Tensor]]
Run = tuple[ResidualSite, ResidualSite, Maps]
"""Source, target, and maps of the source residual by intervention."""
Item = tuple[int, torch.Tensor, torch.Tensor, Sequence[int]]
"""A sequence: its number, ids and special tokens, (1, positions) each, and the positions that may be edited, in the order to take them."""


def measure_all(
    model: TransformersModel,
    label: str,
    items: Sequence[Item],
    sites: Sequence[ResidualSite],
    medians: torch.Tensor,
    count: int | None,
    runs: Sequence[Run],
) -> dict[str, Any]:
    """`measure` for several sequences.

    Args:
        model: The model.
        label: Comes back as it is.
        items: The sequences.
        sites: As in `measure`, like all that follow.
        medians: See there.
        count: See there.
        runs: See there.
    """
    measured = [measure(model, number, ids, special, sites, medians, order, count, runs) for number, ids, special, order in items]
    return {"label": label, "measured": measured}


def measure(
    model: TransformersModel,
    number: int,
    ids: torch.Tensor,
    special: torch.Tensor,
    sites: Sequence[ResidualSite],
    medians: torch.Tensor,
    order: Sequence[int],
    count: int | None,
    runs: Sequence[Run],
) -> dict[str, Any]:
    """Losses of one sequence, as it is and under edits of several pairs.

    Args:
        model: The model.
        number: Of the sequence, for messages.
        ids: int64 (1, positions).
        special: bool (1, positions), true for special tokens.
        sites: Sites that decide which tokens are sinks, sources and targets of the runs among them.
        medians: Their median norms, float64 (sites,).
        order: Positions that may be edited, in the order to take them.
        count: How many of them; None for all.
        runs: The pairs.

    Returns:
        A dictionary: `losses`, float64 (positions - 1,), in nats, unedited; `edited`, the edited positions, sorted; `changes`, float64
        (runs, interventions, 4): mean Δ over all predictions, from the first edit on, and at the edits, and mean KL(clean ‖ edited) from
        the first edit on.

    Raises:
        PositionError: Too few of the positions are ordinary.
    """
    with ATOTrace(model, input_ids=ids, use_cache=False) as t:
        residuals = save(torch.stack([t.residual(site) for site in sites]))
        logits = save(t.logits)
    ordinary = classify(residuals, torch.ones_like(special), special, medians)[0]
    edited = pick(order, count, ordinary[0].tolist(), number)
    place = {int(site): residuals[number] for number, site in enumerate(sites)}
    # A server may run all this under autocast: switch it off for the mathematics, never around a read.
    with torch.autocast(device_type=logits.device.type, enabled=False):
        clean = logits[0, :-1].float()
        targets = ids[0, 1:].to(clean.device)
        losses = token_losses(clean, targets)[0].double()
    last = find_blocks(model._module)[1] - 1
    changes = [
        _changes(model, ids, target, target == last, place[int(source)], place[int(target)], maps, edited, clean, targets, losses)
        for source, target, maps in runs
    ]
    return {"losses": losses.cpu(), "edited": edited, "changes": torch.stack(changes).cpu()}


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`ℓ_p = -log P(token_{p+1} | tokens ≤ p)` in nats.

    Args:
        logits: Float32 (positions, vocabulary), at p.
        targets: int64 (positions,), the tokens at p + 1.

    Returns:
        The losses and the log-normalisers of the logits, each float32 (positions,).
    """
    normaliser = torch.logsumexp(logits, -1)
    return normaliser - logits.gather(-1, targets[:, None])[:, 0], normaliser


def _changes(
    model: TransformersModel,
    ids: torch.Tensor,
    target: ResidualSite,
    last: bool,
    x: torch.Tensor,
    y: torch.Tensor,
    maps: Maps,
    edited: list[int],
    clean: torch.Tensor,
    targets: torch.Tensor,
    losses: torch.Tensor,
) -> torch.Tensor:
    """Changes of one run, float64 (interventions, 4); x and y are (1, positions, d_model)."""
    length = ids.shape[1]
    # Behind the last block no position sees another one, so only the edited ones can change.
    affected = torch.tensor(edited if last else list(range(edited[0], length - 1)), device=clean.device)
    at = torch.tensor([position in edited for position in affected.tolist()])
    behind = length - 1 - edited[0]
    names = list(maps)
    rows = max(1, LOGIT_BYTES // (4 * len(affected) * clean.shape[-1]))
    changes = torch.zeros(len(names), 4, dtype=torch.float64)
    with torch.autocast(device_type=clean.device.type, enabled=False):
        _, normaliser = token_losses(clean[affected], targets[affected])
        probability = torch.exp(clean[affected] - normaliser[:, None])
        negentropy = (probability * clean[affected]).sum(-1) - normaliser
        replacements = [maps[name](x[0, edited]) for name in names]
    for first in range(0, len(names), rows):
        some = names[first : first + rows]
        values = y.repeat(len(some), 1, 1)
        for row in range(len(some)):
            values[row, edited] = replacements[first + row].to(values)
        got = _resumed_logits(model, ids.expand(len(some), -1), target, values, affected)
        with torch.autocast(device_type=clean.device.type, enabled=False):
            for row in range(len(some)):
                logits = got[row].float()
                edited_losses, edited_normaliser = token_losses(logits, targets[affected])
                delta = (edited_losses.double() - losses[affected]).cpu()
                kl = negentropy - (probability * logits).sum(-1) + edited_normaliser
                changes[first + row, 0] = delta.sum() / (length - 1)
                changes[first + row, 1] = delta.sum() / behind
                changes[first + row, 2] = delta[at].mean()
                changes[first + row, 3] = kl.double().sum().cpu() / behind
    return changes


def _resumed_logits(
    model: TransformersModel, ids: torch.Tensor, site: ResidualSite, residuals: torch.Tensor, keep: torch.Tensor
) -> torch.Tensor:
    """Logits at some positions when the residual at a site is given; the blocks up to it do not run."""
    with ATOTrace(model, input_ids=ids, use_cache=False, logits_to_keep=keep) as t:
        t.resume(site, residuals)
        logits: torch.Tensor = save(t.logits)
    return logits
