"""Hartigan's dip of a distribution over layers: how far it is from every distribution with one peak (Ann. Stat. 13, 1985)."""

from __future__ import annotations

import torch

CELLS = 1 << 18
"""Conditions on a distribution function that are held at once."""
ROUNDING = 1e-12
"""By so much sums of weights may miss one."""


def dip(weights: torch.Tensor) -> torch.Tensor:
    """The dip of distributions on a row of bins.

    That is the smallest largest difference between the distribution function and one of a single peak, convex before it and concave behind.
    Each weight is spread evenly over its bin. As atoms, two neighbouring layers would have the largest dip of all, and L equal ones 1/(2L).
    Differences then are largest at edges between bins, so it is that from the nearest weights that rise to one bin and fall behind it.

    Let G lie within ± t of F, with its peak at edge c. A convex G that is t above F at edge j and t below it at k > j cannot reach less at
    c than their line does, ((F_k - t)(c - j) - (F_j + t)(c - k)) / (k - j); the largest of these is the least G(c), and the mirror image
    gives the largest from the right. Everything is linear in t, so Newton's steps from below end at the smallest t that leaves room.

    Args:
        weights: Not negative, float (distributions, bins).

    Returns:
        float64 (distributions,), from 0 (one peak) to below 1/4; NaN where all weights are zero.
    """
    edges = weights.shape[1] + 1
    parts = torch.split(weights.double(), max(CELLS // edges**2, 1))
    return torch.cat([_dip(part) for part in parts]) if len(weights) else weights.new_zeros(0, dtype=torch.float64)


def _dip(weights: torch.Tensor) -> torch.Tensor:
    whole = weights.sum(1, keepdim=True)
    function = torch.nn.functional.pad((weights / torch.where(whole > 0, whole, torch.nan)).cumsum(1), (1, 0))
    bins = weights.shape[1]
    left, right = (_least(one) for one in (function, (1 - function).flip(1)))
    best = torch.full_like(function[:, 0], torch.inf)
    for edge in range(bins + 1):
        (low, low_slope, low_room), (high, high_slope, high_room) = left[edge], right[bins - edge]
        t = torch.maximum(low_room, high_room)
        while True:
            at, mirrored = (low - t[:, None] * low_slope).max(1), (high - t[:, None] * high_slope).max(1)
            lacks = at.values + mirrored.values - 1  # the least from the left lies so far above the largest from the right
            step = lacks / (low_slope[at.indices] + high_slope[mirrored.indices]).clamp(min=1)
            if not bool((lacks > ROUNDING).any()):
                break
            t = t + step.clamp(min=0)
        best = torch.minimum(best, t)
    return best + function[:, -1] * 0  # NaN stays NaN


def _least(function: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each edge c: G(c) ≥ every a - t b, as a, (distributions, conditions), and b, (conditions,), and the least t up to there."""
    found, room = [], torch.zeros_like(function[:, 0])
    for edge in range(function.shape[1]):
        j, k = torch.triu_indices(edge, edge, 1, device=function.device)
        ahead, behind, apart = (edge - j).double(), (edge - k).double(), (k - j).double()
        lines = (function[:, k] * ahead - function[:, j] * behind) / apart
        slopes = (ahead + behind) / apart
        # And G(c) ≥ F(c) - t, and ≥ 0; the mirror image keeps it below one.
        room = torch.maximum(room, ((lines - function[:, edge, None]) / (1 + slopes)).amax(1)) if len(j) else room
        here = torch.stack([function[:, edge], torch.zeros_like(room)], 1)
        found.append((torch.cat([lines, here], 1), torch.cat([slopes, slopes.new_tensor([1.0, 0.0])]), room))
    return found
