"""What one sequence loses when residuals are replaced: the part of an ablation that runs where the model is.

Everything here is a plain function on torch and traces, so that it can run on a server where nnato is not installed; only numbers per
sequence come back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from nnato.blocks import find_blocks
from nnato.positions import pick
from nnato.reduction import capture, classify, stacked
from nnato.sites import ResidualSite
from nnato.trace import ATOTrace, save

if TYPE_CHECKING:
    from nnato.nnsight_setup import TransformersModel

LOGIT_BYTES = 3 << 29
"""Logits of edited rows held at once; decides how many interventions share a forward pass."""

Way = tuple[str, Callable[[torch.Tensor], torch.Tensor] | None, torch.Tensor | None, torch.Tensor | None]
"""How a residual is made anew: a kind (see `replaced`), a map of the source residual, and two factors of a projector or a vector."""
Step = tuple[ResidualSite, ResidualSite, Mapping[str, Way]]
"""Source, target, and ways by intervention."""
Run = Sequence[Step]
"""Steps of one pass, by ascending target; all have the same interventions."""
Set = tuple[Sequence[int], int | None, float | None, bool]
"""Positions in the order to take them, how many, the activity they must exceed, and whether there may be none."""
Reference = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""What an edited pass is compared with at some positions: these, and of the unedited logits there the log-normaliser, the probabilities,
their expected logit, and the most likely token."""
Item = tuple[int, torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None, Sequence[Set]]
"""A sequence: its number, ids and special tokens, (1, positions) each; the same of a sequence of another document, if it is needed; and
the sets of positions to edit."""


def measure_all(
    model: TransformersModel,
    label: str,
    items: Sequence[Item],
    sites: Sequence[ResidualSite],
    medians: torch.Tensor,
    runs: Sequence[Run],
    shared: Sequence[str],
    features: torch.Tensor | None,
) -> dict[str, Any]:
    """`measure` for several sequences.

    Args:
        model: The model.
        label: Comes back as it is.
        items: The sequences.
        sites: As in `measure`, like all that follow.
        medians: See there.
        runs: See there.
        shared: See there.
        features: See there.
    """
    return {"label": label, "measured": [measure(model, item, sites, medians, runs, shared, features) for item in items]}


def measure(
    model: TransformersModel,
    item: Item,
    sites: Sequence[ResidualSite],
    medians: torch.Tensor,
    runs: Sequence[Run],
    shared: Sequence[str],
    features: torch.Tensor | None,
) -> dict[str, Any]:
    """Losses of one sequence, as it is and under edits.

    Args:
        model: The model.
        item: The sequence.
        sites: Sites that decide which tokens are sinks, sources and targets of the runs among them.
        medians: Their median norms, float64 (sites,).
        runs: What to replace.
        shared: Interventions that are the same in all runs of one step to the same target: they are measured once.
        features: Directions, float64 (directions, d_model), of whose largest projection at the first target activity is.

    Returns:
        A dictionary: `losses`, float64 (positions - 1,), in nats, unedited; `edited`, for each set the edited positions, sorted; `counts`,
        float64 (sets, bins), positions from the first edit on by their distance from the last edit before them (0, 1, 2-3, 4-7, 8-15, …);
        `sums`, float64 (sets, runs, interventions, bins, 3): sums over those positions of Δ, of KL(clean ‖ edited), and of whether the
        most likely next token stays the same.

    Raises:
        PositionError: Too few of the positions are ordinary.
    """
    number, ids, special, other, sets = item
    with ATOTrace(model, input_ids=ids, use_cache=False) as t:
        residuals = save(stacked(model, t, sites))
        logits = save(t.logits)
    ordinary = classify(residuals, torch.ones_like(special), special, medians)[0][0].tolist()
    place = {int(site): residuals[at, 0] for at, site in enumerate(sites)}
    donors = {} if other is None else _donors(model, other, sites, medians)
    # A server may run all this under autocast: switch it off for the mathematics, never around a read.
    with torch.autocast(device_type=logits.device.type, enabled=False):
        clean = logits[0, :-1].float()
        targets = ids[0, 1:].to(clean.device)
        losses = token_losses(clean, targets)[0].double()
        active = None if features is None else activity(place[int(runs[0][0][1])], features)
    last = find_blocks(model._module)[1] - 1
    edited: list[list[int]] = []
    counts: list[torch.Tensor] = []
    sums: list[torch.Tensor] = []
    for order, count, above, may_be_absent in sets:
        allowed = ordinary
        if above is not None and active is not None:
            allowed = [fine and strength > above for fine, strength in zip(ordinary, active, strict=True)]
        at = pick(order, count, allowed, number, may_be_absent)
        edited.append(at)
        counts.append(torch.bincount(distance_bins(at, len(losses)), minlength=bins_of(len(losses))).double())
        others = mates(at, ordinary)
        found: list[torch.Tensor] = []
        once: dict[int, dict[str, torch.Tensor]] = {}
        references: dict[bool, Reference] = {}
        for run in runs:
            known = once.get(int(run[0][1]), {}) if len(run) == 1 else {}
            new = [(source, target, {name: way for name, way in ways.items() if name not in known}) for source, target, ways in run]
            behind = run[0][1] == last
            if at and behind not in references:
                # Behind the last block no position sees another one, so only the edited ones can change.
                references[behind] = _reference(clean, at if behind else list(range(at[0], len(losses))))
            rows = iter(_sums(model, ids, new, behind, place, donors, at, others, references.get(behind), targets, losses))
            mine = {name: known[name] if name in known else next(rows) for name in run[0][2]}
            once.setdefault(int(run[0][1]), {name: mine[name] for name in shared} if len(run) == 1 else {})
            found.append(torch.stack(list(mine.values())))
        sums.append(torch.stack(found))
    return {"losses": losses.cpu(), "edited": edited, "counts": torch.stack(counts), "sums": torch.stack(sums)}


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


def mean_logit(probability: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Mean of logits under probabilities, both float32 (positions, vocabulary); float32 (positions,)."""
    return torch.bmm(probability[:, None], logits[:, :, None])[:, 0, 0]  # without a product in memory


def _reference(clean: torch.Tensor, positions: list[int]) -> Reference:
    """What edited passes are compared with at some positions; clean is float32 (positions, vocabulary)."""
    affected = torch.tensor(positions)  # for tensors of any device: the head of a spread model may be on another than the last block
    with torch.autocast(device_type=clean.device.type, enabled=False):
        before = clean[affected]
        normaliser = torch.logsumexp(before, -1)
        probability = torch.exp(before - normaliser[:, None])
        return affected, normaliser, probability, mean_logit(probability, before), before.argmax(-1)


def bins_of(predictions: int) -> int:
    """How many bins of distance a sequence of so many predictions has."""
    return max(predictions - 1, 0).bit_length() + 1


def distance_bins(edited: Sequence[int], predictions: int) -> torch.Tensor:
    """Bins (0, 1, 2-3, 4-7, …) of the positions from the first edited one on, by distance from the last edit before them; int64."""
    if not edited:
        return torch.zeros(0, dtype=torch.int64)
    latest, bins = edited[0], []
    for position in range(edited[0], predictions):
        latest = position if position in edited else latest
        bins.append((position - latest).bit_length())
    return torch.tensor(bins)


def mates(edited: Sequence[int], ordinary: Sequence[bool]) -> list[int]:
    """For each edited position another ordinary one: half way on among the ordinary ones, and round the end."""
    places = [position for position, fine in enumerate(ordinary) if fine]
    return [places[(places.index(position) + len(places) // 2) % len(places)] for position in edited]


def activity(residual: torch.Tensor, features: torch.Tensor) -> list[float]:
    """The largest projection of residuals, float (positions, d_model), on directions, float64 (directions, d_model)."""
    strongest: list[float] = (residual.double() @ features.to(residual.device).T).amax(-1).tolist()
    return strongest


def _donors(
    model: TransformersModel, other: tuple[torch.Tensor, torch.Tensor], sites: Sequence[ResidualSite], medians: torch.Tensor
) -> dict[int, torch.Tensor]:
    """Residuals of another sequence by site, (positions, d_model): at each position those of the nearest ordinary token."""
    ids, special = other
    residuals = capture(model, ids, sites)
    ordinary = classify(residuals, torch.ones_like(special), special, medians)[0][0].tolist()
    places = [position for position, fine in enumerate(ordinary) if fine] or list(range(len(ordinary)))
    nearest = [min(places, key=lambda place: abs(place - position)) for position in range(len(ordinary))]
    return {int(site): residuals[at, 0, nearest] for at, site in enumerate(sites)}


def replaced(way: Way, x: torch.Tensor, y: torch.Tensor, at: list[int], others: list[int], donor: torch.Tensor | None) -> torch.Tensor:
    """New residuals for some positions of a sequence.

    Args:
        way: Its kind is `map` (the map of x), `resample` (the donor), `moved_error` (y plus the map's error at another token), `add` (y and
            a vector), `within` or `outside` (the map's prediction within or outside a subspace, y elsewhere).
        x: At the source, float (positions, d_model).
        y: At the target.
        at: The positions.
        others: Another position for each.
        donor: As y, of another sequence.

    Returns:
        Float (edited positions, d_model).
    """
    kind, predict, left, right = way
    if kind == "map" and predict is not None:
        return predict(x[at])
    if kind == "resample" and donor is not None:
        return donor[at]
    here = y[at].double()
    if kind == "add" and right is not None:
        return here + right.to(here.device)
    if kind == "moved_error" and predict is not None:
        return here + predict(x[others]).double() - y[others].double()
    if predict is None or left is None or right is None:
        raise ValueError(f"a way of kind {kind!r} lacks what it needs")
    change = predict(x[at]).double() - here
    within = change @ left.to(here.device) @ right.to(here.device)
    return here + (within if kind == "within" else change - within)


def _sums(
    model: TransformersModel,
    ids: torch.Tensor,
    run: Run,
    last: bool,
    place: Mapping[int, torch.Tensor],
    donors: Mapping[int, torch.Tensor],
    edited: list[int],
    others: list[int],
    reference: Reference | None,
    targets: torch.Tensor,
    losses: torch.Tensor,
) -> torch.Tensor:
    """Sums of one run, float64 (interventions, bins, 3), as `measure` gives them; the reference is None if nothing is edited."""
    source, target, ways = run[0]
    names, predictions = list(ways), len(losses)
    sums = torch.zeros(len(names), bins_of(predictions), 3, dtype=torch.float64)
    if reference is None:
        return sums
    bins = distance_bins(edited, predictions)
    affected, normaliser, probability, expected, likeliest = reference
    if last:
        sums[:, 1:, 2] = torch.bincount(bins, minlength=sums.shape[1])[1:].double()
        bins = bins[bins == 0]
    rows = max(1, LOGIT_BYTES // (4 * probability.numel()))
    x, y = place[int(source)], place[int(target)]
    with torch.autocast(device_type=y.device.type, enabled=False):
        replacements = [replaced(ways[name], x, y, edited, others, donors.get(int(target))) for name in names]
    for first in range(0, len(names), rows):
        some = names[first : first + rows]
        values = y.repeat(len(some), 1, 1)
        for row in range(len(some)):
            values[row, edited] = replacements[first + row].to(values)
        got = _resumed_logits(model, ids.expand(len(some), -1), run, some, values, place, donors, edited, others, affected)
        with torch.autocast(device_type=y.device.type, enabled=False):
            for row in range(len(some)):
                logits = got[row].float()
                edited_losses, edited_normaliser = token_losses(logits, targets[affected])
                delta = edited_losses.double() - losses[affected]
                # In this order it is exactly zero where nothing changed.
                kl = (expected - mean_logit(probability, logits)) + (edited_normaliser - normaliser)
                columns = torch.stack([delta, kl.double(), (logits.argmax(-1) == likeliest).double()], dim=1)
                sums[first + row].index_add_(0, bins, columns.cpu())
    return sums


def _resumed_logits(
    model: TransformersModel,
    ids: torch.Tensor,
    run: Run,
    names: Sequence[str],
    residuals: torch.Tensor,
    place: Mapping[int, torch.Tensor],
    donors: Mapping[int, torch.Tensor],
    edited: list[int],
    others: list[int],
    keep: torch.Tensor,
) -> torch.Tensor:
    """Logits at some positions when the residual at the first target is given; the blocks up to it do not run.

    Later steps of the run replace residuals of this pass. What they read before the first target is as without edits.
    """
    with ATOTrace(model, input_ids=ids, use_cache=False, logits_to_keep=keep) as t:
        t.resume(run[0][1], residuals)
        for source, target, ways in run[1:]:
            x = t.residual(source) if source >= run[0][1] else place[int(source)].expand(len(names), -1, -1)
            _step(t, target, x, [ways[name] for name in names], donors.get(int(target)), edited, others)
        logits: torch.Tensor = save(t.logits)
    return logits


def _step(
    t: ATOTrace,
    target: ResidualSite,
    x: torch.Tensor,
    ways: Sequence[Way],
    donor: torch.Tensor | None,
    edited: list[int],
    others: list[int],
) -> None:
    """Replace residuals of a running pass, in a way of its own in each row; x and the target residual are (rows, positions, d_model)."""

    def new(y: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device_type=y.device.type, enabled=False):
            seen, values = x[:].to(y.device), y.clone()  # x[:] waits, if x is yet to be read
            for row, way in enumerate(ways):
                values[row, edited] = replaced(way, seen[row], y[row], edited, others, donor).to(values)
        return values

    t.patch(target, new)
