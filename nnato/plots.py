"""Figures, from results only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from nnato.cca import participation_ratio
from nnato.effects import AblationResult
from nnato.efficiency import Efficiency, PaperEfficiency
from nnato.fitting import Fit
from nnato.intervals import Interval
from nnato.scaling import Scaling
from nnato.storage import atomic

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
    "resample": "#6d597a",
    "shuffled": "#b5838d",
    "shrunk_to_identity": "#468faf",
}
OTHER_COLOUR = "#89c2d9"
"""Of interventions that have no colour of their own: other operators."""


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure whole or not at all; the suffix decides the format."""
    with matplotlib.rc_context({"svg.hashsalt": "nnato"}), atomic(path) as temporary:
        figure.savefig(temporary, dpi=150, bbox_inches="tight")
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
    most = max(len(sources), len(targets))
    figure = Figure(figsize=(2 * max(4.6, 0.42 * most + 1.2), max(4.2, 0.42 * most + 0.6)), layout="constrained")
    titles = ("held-out R² of the operator", "gain over identity + mean shift\n(or over the mean, if that is better)")
    for axes, grid, title in zip(figure.subplots(1, 2), grids, titles, strict=True):
        image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", origin="lower")
        for row, column in zip(*np.nonzero(~np.isnan(grid)), strict=True):
            value = grid[row, column]
            text = f"{value:.2f}"
            colour = "black" if value > 0.6 else "white"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8 if most < 10 else 6.5)
        axes.set_xticks(range(len(sources)), [str(site) for site in sources])
        axes.set_yticks(range(len(targets)), [str(site) for site in targets])
        axes.set_xlabel("source (after block)")
        axes.set_ylabel("target (after block)")
        axes.set_title(title, fontsize=10)
        figure.colorbar(image, ax=axes, shrink=0.8)
    figure.suptitle(f"R², {METRIC_NAMES[metric]}, ordinary tokens of test documents · {about}", fontsize=10)
    return save_figure(figure, path)


def efficiency_curves(results: Sequence[Efficiency], path: Path, about: str) -> Path:
    """Efficiency against rank with 95 % bands, and beside it R² and ceiling that it is the ratio of.

    Args:
        results: Results of `transport_efficiency`.
        path: Where to write; the suffix decides the format.
        about: Model and text, for the title.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for result, colour in zip(results, colours(len(results)), strict=True):
        ranks = [point.rank for point in result.points]
        values, low, high = ([getattr(point.efficiency, name) for point in result.points] for name in ("value", "low", "high"))
        left.plot(ranks, values, marker=".", color=colour, label=f"{result.pair[0]} → {result.pair[1]}")
        left.fill_between(ranks, low, high, color=colour, alpha=0.2, linewidth=0)
        right.plot(ranks, [point.r2.value for point in result.points], marker=".", color=colour)
        right.plot(ranks, [point.ceilings["debiased"] for point in result.points], color=colour, linestyle="--", linewidth=1)
        right.plot(ranks, [point.ceilings["in_sample"] for point in result.points], color=colour, linestyle=":", linewidth=1)
    left.axhline(1, color="black", linewidth=0.8)
    left.set_title("efficiency: R² / debiased ceiling of the same rank", fontsize=10)
    right.set_title("R² on test (dots), ceiling debiased (dashed) and in sample (dotted)", fontsize=10)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("rank of the operator")
    left.set_ylabel("η(r)")
    right.set_ylabel("whitened R²")
    left.legend(fontsize=8, title="source → target")
    figure.suptitle(f"Reduced-rank operators, whitened metric, ordinary tokens, 95 % bands · {about}", fontsize=10)
    return save_figure(figure, path)


def paper_efficiency_curves(results: Sequence[PaperEfficiency], path: Path, about: str) -> Path:
    """Efficiency against rank by the authors' protocol.

    Args:
        results: Results of `paper_efficiencies`.
        path: Where to write; the suffix decides the format.
        about: Model and text, for the title.
    """
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    for result, colour in zip(results, colours(len(results)), strict=True):
        axes.plot(result.ranks, result.efficiency, marker=".", color=colour, label=f"{result.pair[0]} → {result.pair[1]}")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xlabel("rank (singular values of W kept)")
    axes.set_ylabel("η(r), uncentred whitened metric")
    axes.legend(fontsize=8, title="source → target")
    axes.set_title(f"Efficiency as in the paper: truncated operators, in-sample ceiling\n{about}", fontsize=10)
    return save_figure(figure, path)


def correlation_spectra(results: Sequence[Efficiency], path: Path, about: str) -> Path:
    """Squared canonical correlations in sample, cross-fitted, debiased and of shuffled pairs, with the noise edge; one panel per pair.

    Args:
        results: Results of `transport_efficiency`.
        path: Where to write; the suffix decides the format.
        about: Model and text, for the title.
    """
    columns = min(2, len(results))
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(5 * columns, 3 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, result in zip(panels, results, strict=False):
        found = result.correlations
        curves = (
            ("in sample", found.rho.square(), "#2a6f97"),
            ("debiased", found.debiased, "#bc4749"),
            ("cross-fitted", found.cross_fitted, "#e09f3e"),
            ("shuffled pairs", found.null.square(), "#8d99ae"),
        )
        for name, values, colour in curves:
            if len(values):
                axes.plot(range(1, len(values) + 1), values.tolist(), label=name, color=colour, linewidth=1.2)
        axes.axhline(found.size.edge, color="black", linewidth=0.8, linestyle="--", label="noise edge")
        axes.set_title(f"{result.pair[0]} → {result.pair[1]}: transport subspace of {found.dimensions} dimensions", fontsize=9)
        axes.set_ylabel("ρ²")
        axes.set_ylim(-0.03, 1.03)
    for axes in panels[len(results) :]:
        axes.set_axis_off()
    panels[0].legend(fontsize=8)
    figure.suptitle(f"Canonical correlations of source and target, ordinary training tokens · {about}", fontsize=10)
    return save_figure(figure, path)


def subspace_bars(results: Sequence[Efficiency], path: Path, about: str) -> Path:
    """Sizes of the Linear Transport Subspace by several definitions, one group per pair.

    Args:
        results: Results of `transport_efficiency`.
        path: Where to write; the suffix decides the format.
        about: Model and text, for the title.
    """
    bars: dict[str, tuple[str, list[float]]] = {
        "Σρ², debiased": ("#2a6f97", [float(result.correlations.debiased.sum()) for result in results]),
        "dimensions above the noise edge": ("#61a5c2", [result.correlations.dimensions for result in results]),
        "rank for 90 % of Σρ²": ("#e09f3e", [result.correlations.rank_for(0.9) for result in results]),
        "participation ratio (paper)": ("#8d99ae", [participation_ratio(result.correlations.rho) for result in results]),
        "participation ratio, shuffled pairs": ("#d6d9e0", [participation_ratio(result.correlations.null) for result in results]),
    }
    figure = Figure(figsize=(max(6, 1.6 * len(results) + 2), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(bars)
    for number, (name, (colour, values)) in enumerate(bars.items()):
        places = [group + (number - (len(bars) - 1) / 2) * width for group in range(len(results))]
        axes.bar(places, values, width, color=colour, label=name)
    axes.axhline(results[0].correlations.width, color="black", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(results)), [f"{result.pair[0]} → {result.pair[1]}" for result in results])
    axes.set_ylabel("dimensions (dashed: all)")
    axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.08))
    axes.set_title(f"Size of the Linear Transport Subspace · {about}", fontsize=10)
    return save_figure(figure, path)


def scaling_curves(results: Sequence[Scaling], path: Path, metric: str, about: str) -> Path:
    """R² against training tokens with 95 % bands.

    Args:
        results: Results of `scaling_study`.
        path: Where to write; the suffix decides the format.
        metric: One of `metrics.METRICS`.
        about: Model and text, for the title.
    """
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    for result, colour in zip(results, colours(len(results)), strict=True):
        tokens = [point.tokens for point in result.points]
        values, low, high = ([getattr(point.r2[metric], name) for point in result.points] for name in ("value", "low", "high"))
        axes.plot(tokens, values, marker=".", color=colour, label=f"{result.pair[0]} → {result.pair[1]}")
        axes.fill_between(tokens, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set_xscale("log")
    shown = [results[0].points[number].tokens for number in sorted({0, (len(results[0].points) - 1) // 2, len(results[0].points) - 1})]
    axes.set_xticks(shown, [f"{tokens:,}" for tokens in shown])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("training tokens")
    axes.set_ylabel(f"R² on test, {METRIC_NAMES[metric]}")
    axes.legend(fontsize=8, title="source → target")
    axes.set_title(f"R² against training tokens, ordinary tokens, 95 % bands\n{about}", fontsize=10)
    return save_figure(figure, path)


def colours(count: int) -> list[tuple[float, ...]]:
    """So many colours, from dark to light."""
    palette = matplotlib.colormaps["viridis"]
    return [palette(0.9 * number / max(1, count - 1)) for number in range(count)]


def ablation_bars(results: Sequence[AblationResult], path: Path, about: str) -> Path:
    """Bars of log-perplexity and of Δloss with 95 % intervals, one row per pair.

    Args:
        results: Results of `ablate`.
        path: Where to write; the suffix decides the format.
        about: Model and text, for the title.
    """
    figure = Figure(figsize=(10, max(2.6, 0.9 + 0.34 * len(results[0].effects)) * len(results) + 0.8), layout="constrained")
    for (left, right), result in zip(figure.subplots(len(results), 2, squeeze=False), results, strict=True):
        pair = result.name()
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
    how = f"{first.draws.describe()}, {first.size()}, {first.documents} documents, 95 % intervals"
    figure.suptitle(f"Residuals replaced at {how} · {about}", fontsize=10)
    return save_figure(figure, path)


def _bars(axes: Axes, values: Mapping[str, Interval], base: float = 0.0) -> None:
    """One horizontal bar with its interval per intervention, from a base value."""
    heights = [value.value for value in values.values()]
    # A point interval may miss its value by a rounding error.
    errors = [[max(0.0, v.value - v.low) for v in values.values()], [max(0.0, v.high - v.value) for v in values.values()]]
    colours = [COLOURS.get(name, OTHER_COLOUR) for name in values]
    axes.barh(range(len(values)), heights, left=base, xerr=errors, color=colours, capsize=3)
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
