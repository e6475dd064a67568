"""Figures of features, from results only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from nnato.features import FeatureResult
from nnato.plots import colours, save_figure

ALL_TOKENS = "R² of decoder directions, all ordinary tokens of test documents"


def r2_by_leap(results: Sequence[FeatureResult], path: Path, about: str) -> Path:
    """Distribution of R² over features by source, with random directions beside it, and beside that the verdicts.

    Args:
        results: Results of `evaluate_features` with one target.
        path: Where to write; the suffix decides the format.
        about: Model and text, for the title.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for result, colour in zip(results, colours(len(results)), strict=True):
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
    figure.suptitle(f"{ALL_TOKENS} · {about}", fontsize=10)
    return save_figure(figure, path)


def r2_distributions(
    results: Sequence[FeatureResult], path: Path, about: str, values: Sequence[torch.Tensor] | None = None, what: str = ALL_TOKENS
) -> Path:
    """Distribution over features by leap, one panel for each target (the paper's Fig. 2), with the median of random directions.

    Args:
        results: Results of `evaluate_features`.
        path: Where to write; the suffix decides the format.
        about: Model and text, for the title.
        values: Of each result, what is shown of its features, float (features,); by default held-out R² of all tokens. Shown from -1 on.
        what: What these are, for the title.
    """
    shown = _known(results, values)
    targets = sorted({result.pair[1] for result in results})
    figure = Figure(figsize=(max(5.0, 3.2 * len(targets) + 1), 4.2), layout="constrained")
    panels = figure.subplots(1, len(targets), sharey=True, squeeze=False)[0]
    for axes, target in zip(panels, targets, strict=True):
        mine = sorted((result.leap, place) for place, result in enumerate(results) if result.pair[1] == target and len(shown[place]))
        places = [place for _, place in mine]
        spots = range(len(places))
        if places:
            bodies = axes.violinplot([shown[place].clamp(min=-1).tolist() for place in places], spots, showextrema=False, widths=0.85)
            for body in bodies["bodies"]:
                body.set_facecolor("#2a6f97")
                body.set_alpha(0.35)
        for spot, place in zip(spots, places, strict=True):
            low, middle, high = torch.quantile(shown[place].clamp(min=-1), torch.tensor([0.25, 0.5, 0.75]).to(shown[place])).tolist()
            axes.vlines(spot, low, high, color="#2a6f97", linewidth=3)
            axes.plot(spot, middle, "o", color="white", markeredgecolor="#2a6f97", markersize=5)
            if values is None:
                random = results[place].random.r2["transport"].value.nanmedian()
                axes.plot([spot - 0.35, spot + 0.35], [float(random)] * 2, color="#bc4749", linewidth=1.5)
        axes.set_xticks(spots, [str(one) for one, _ in mine])
        axes.set_xlabel("leap (blocks)")
        axes.set_title(f"into {target}", fontsize=10)
        axes.axhline(0, color="black", linewidth=0.6)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("R²" + (" (red: median of random directions)" if values is None else ""))
    figure.suptitle(f"{what} · {about}", fontsize=10)
    return save_figure(figure, path)


def mean_grid(
    results: Sequence[FeatureResult], path: Path, about: str, values: Sequence[torch.Tensor] | None = None, what: str = ALL_TOKENS
) -> Path:
    """Mean over features for every (source, target) (the paper's Fig. 3). With several dictionaries, compare along a target only.

    Args:
        results: Results of `evaluate_features`.
        path: Where to write; the suffix decides the format.
        about: Model and text, for the title.
        values: As in `r2_distributions`; the mean is of the values themselves.
        what: As there.
    """
    shown = _known(results, values)
    sources, targets = (sorted({result.pair[end] for result in results}) for end in (0, 1))
    grid = torch.full((len(targets), len(sources)), float("nan"), dtype=torch.float64)
    for result, mine in zip(results, shown, strict=True):
        grid[targets.index(result.pair[1]), sources.index(result.pair[0])] = mine.double().mean()
    size = 0.75 * max(len(sources), len(targets)) + 2
    figure = Figure(figsize=(size + 2.5, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid.numpy(), vmin=0, vmax=1, cmap="viridis", origin="lower")
    for row, column in torch.nonzero(~torch.isnan(grid)).tolist():
        value = float(grid[row, column])
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="black" if value > 0.6 else "white", fontsize=8)
    axes.set_xticks(range(len(sources)), [str(site) for site in sources])
    axes.set_yticks(range(len(targets)), [str(site) for site in targets])
    axes.set_xlabel("source (after block)")
    axes.set_ylabel("target (after block)")
    figure.colorbar(image, ax=axes, shrink=0.8, label="mean over features")
    figure.suptitle(f"{what}\n{about}", fontsize=10)
    return save_figure(figure, path)


def trajectories(results: Sequence[FeatureResult], path: Path, about: str, most: int = 60) -> Path:
    """R² of single features over leaps into one target, with the median and the middle half of all of them.

    Args:
        results: Results of `evaluate_features` with one target and the same features.
        path: Where to write; the suffix decides the format.
        about: Model and text, for the title.
        most: Features drawn as lines, evenly over the order of their mean R²; coloured by it.
    """
    ordered = sorted(results, key=lambda result: result.leap)
    leaps = [result.leap for result in ordered]
    table = torch.stack([result.scores.r2["transport"].value for result in ordered]).cpu()
    table = table[:, ~torch.isnan(table).any(0)]
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    order = table.mean(0).argsort()
    chosen = order[torch.linspace(0, max(len(order) - 1, 0), min(most, len(order))).round().long()]
    for feature, colour in zip(chosen.tolist(), colours(len(chosen)), strict=True):
        axes.plot(leaps, table[:, feature].tolist(), color=colour, linewidth=0.5, alpha=0.6)
    if len(order):
        low, middle, high = torch.quantile(table, torch.tensor([0.25, 0.5, 0.75]).to(table), dim=1)
        axes.fill_between(leaps, low.tolist(), high.tolist(), color="black", alpha=0.15, linewidth=0, label="middle half of features")
        axes.plot(leaps, middle.tolist(), color="black", marker="o", label="median feature")
    random = [float(result.random.r2["transport"].value.nanmedian()) for result in ordered]
    axes.plot(leaps, random, color="#bc4749", linestyle="--", label="median random direction")
    axes.set_xticks(leaps)
    axes.set_xlabel("leap (blocks)")
    axes.set_ylabel("held-out R²")
    axes.legend(fontsize=8)
    figure.suptitle(f"features at {ordered[0].pair[1]}, all ordinary tokens of test documents · {about}", fontsize=10)
    return save_figure(figure, path)


def _known(results: Sequence[FeatureResult], values: Sequence[torch.Tensor] | None) -> list[torch.Tensor]:
    """What is not NaN of each result's values."""
    every = [result.scores.r2["transport"].value for result in results] if values is None else values
    return [one[~torch.isnan(one)].cpu() for one in every]
