"""Figures, from results only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from nnato.fitting import Fit
from nnato.intervals import Interval
from nnato.perplexity import AblationResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRIC_NAMES = {
    "variance_weighted": "variance-weighted",
    "uniform": "uniform over coordinates",
    "whitened": "whitened",
}
COLOURS = {
    "transport": "#2a6f97",
    "identity": "#e09f3e",
    "identity_shift": "#c97b2b",
    "mean": "#8d99ae",
    "zero": "#bc4749",
    "null_input": "#7f5539",
}


def _save(figure: Figure, path: Path) -> Path:
    with matplotlib.rc_context({"svg.hashsalt": "nnato"}):
        figure.savefig(path, dpi=150, bbox_inches="tight")
    return path


def r2_heat_maps(fits: Sequence[Fit], path: Path, metric: str, about: str) -> Path:
    """Source × target heat maps of held-out R²: of the operator, and what it adds to the identity with shifted mean.

    Args:
        fits: Results of `fit`.
        path: Where to write; the suffix decides the format.
        metric: One of `metrics.METRICS`.
        about: Model and text, for the title.
    """
    sources = sorted({result.operator.source for result in fits})
    targets = sorted({result.operator.target for result in fits})
    grids = np.full((2, len(targets), len(sources)), np.nan)
    for result in fits:
        row, column = targets.index(result.operator.target), sources.index(result.operator.source)
        grids[:, row, column] = (
            result.r2[metric],
            result.r2[metric] - max(result.baselines["identity_shift"][metric], 0),
        )
    figure = Figure(figsize=(4.6 * 2, 4.2), layout="constrained")
    titles = ("held-out R² of the operator", "gain over identity + mean shift\n(or over the mean, if that is better)")
    for axes, grid, title in zip(figure.subplots(1, 2), grids, titles, strict=True):
        image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", origin="lower")
        for row, column in zip(*np.nonzero(~np.isnan(grid)), strict=True):
            value = grid[row, column]
            axes.text(
                column,
                row,
                f"{value:.2f}",
                ha="center",
                va="center",
                color="black" if value > 0.6 else "white",
                fontsize=8,
            )
        axes.set_xticks(range(len(sources)), [str(site) for site in sources])
        axes.set_yticks(range(len(targets)), [str(site) for site in targets])
        axes.set_xlabel("source (after block)")
        axes.set_ylabel("target (after block)")
        axes.set_title(title, fontsize=10)
        figure.colorbar(image, ax=axes, shrink=0.8)
    figure.suptitle(f"R², {METRIC_NAMES[metric]}, ordinary tokens of test documents · {about}", fontsize=10)
    return _save(figure, path)


def ablation_bars(results: Sequence[AblationResult], path: Path, about: str) -> Path:
    """Bars of log-perplexity and of Δloss with 95 % intervals, one row per pair.

    Args:
        results: Results of `ablate`.
        path: Where to write; the suffix decides the format.
        about: Model and text, for the title.
    """
    figure = Figure(figsize=(10, 2.6 * len(results) + 0.8), layout="constrained")
    for (left, right), result in zip(figure.subplots(len(results), 2, squeeze=False), results, strict=True):
        pair = f"{result.pair[0]} → {result.pair[1]}"
        diluted = {name: effect.delta_loss_diluted for name, effect in result.effects.items()}
        _bars(left, diluted, base=result.log_perplexity)
        left.axvline(result.log_perplexity, color="black", linewidth=1)
        left.set_title(f"{pair}: log-perplexity over all predictions (line: unedited)", fontsize=9)
        left.set_xlabel("nats")
        _bars(right, {name: effect.delta_loss_at_edit for name, effect in result.effects.items()})
        right.set_xscale("symlog", linthresh=0.1)
        right.set_title(f"{pair}: Δloss at the edited positions", fontsize=9)
        right.set_xlabel("nats (log scale from 0.1)")
    first = results[0]
    how = f"{first.positions.describe()}, {first.sequences} sequences of {first.documents} documents, 95 % intervals"
    figure.suptitle(f"Residuals replaced at {how} · {about}", fontsize=10)
    return _save(figure, path)


def _bars(axes: Axes, values: Mapping[str, Interval], base: float = 0.0) -> None:
    """One horizontal bar with its interval per intervention, from a base value."""
    heights = [value.value for value in values.values()]
    # A point interval may miss its value by a rounding error.
    errors = [[max(0.0, v.value - v.low) for v in values.values()], [max(0.0, v.high - v.value) for v in values.values()]]
    colours = [COLOURS[name] for name in values]
    axes.barh(range(len(values)), heights, left=base, xerr=errors, color=colours, capsize=3)
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
