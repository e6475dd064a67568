"""Figures of features, from results only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from nnato.features import FeatureResult
from nnato.plots import _colours, _save


def r2_by_leap(results: Sequence[FeatureResult], path: Path, about: str) -> Path:
    """Distribution of R² over features by source, with random directions beside it, and beside that the verdicts.

    Args:
        results: Results of `evaluate_features` with one target.
        path: Where to write; the suffix decides the format.
        about: Model and text, for the title.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for result, colour in zip(results, _colours(len(results)), strict=True):
        name = f"{result.pair[0]} → {result.pair[1]}"
        for scores, style in ((result.scores, "-"), (result.random, ":")):
            known = scores.r2["transport"].value
            known = known[~torch.isnan(known)].sort().values
            shares = [(place + 1) / len(known) for place in range(len(known))]
            left.plot(known.tolist(), shares, color=colour, linestyle=style, label=name if style == "-" else None)
    left.set_xlim(-0.1, 1)
    left.set_xlabel("held-out R² (dotted: random directions)")
    left.set_ylabel("share of features up to it")
    left.legend(fontsize=8, title="source → target")
    counts = [result.verdicts.counts() for result in results]
    below = [0.0] * len(results)
    for verdict, shade in (("transported", "#2a6f97"), ("mixed", "#e09f3e"), ("undetermined", "#d6d9e0"), ("synthesised", "#bc4749")):
        heights = [count[verdict] / len(result.features) for count, result in zip(counts, results, strict=True)]
        right.bar(range(len(results)), heights, bottom=below, color=shade, label=verdict)
        below = [base + height for base, height in zip(below, heights, strict=True)]
    right.set_xticks(range(len(results)), [f"{result.pair[0]} → {result.pair[1]}" for result in results])
    right.set_ylabel("share of features")
    right.legend(fontsize=8, loc="lower right")
    figure.suptitle(f"R² of decoder directions, all ordinary tokens of test documents · {about}", fontsize=10)
    return _save(figure, path)
