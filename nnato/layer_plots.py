"""Figures of multi-layer SAEs and lenses, from results only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from nnato.fidelity import Fidelity
from nnato.layer_stats import layer_distributions, mean_layer_histograms
from nnato.lens_training import LensScore
from nnato.multilayer import LayerActivity
from nnato.plots import save_figure
from nnato.prompts import PromptActivity
from nnato.sites import ResidualSite

COLOURS = ("#2a6f97", "#e09f3e", "#bc4749", "#7f5539")


def layer_figure(activity: LayerActivity, path: Path, about: str) -> Path:
    """Where latents are active: each one's distribution over layers, the mean layers, and how many layers are active at a token.

    Beside the mean layers, how far they lie from a layer: 0 for a latent that keeps to one.

    Args:
        activity: What `layer_activity` returned.
        path: Where to write; the suffix decides the format.
        about: Model and text, for the title.
    """
    stats = activity.stats
    found = layer_distributions(stats)
    live = (stats.total.sum(1) > 0).numpy()
    mean = found["mean"].numpy()[live]
    shares = (stats.total / stats.total.sum(1, keepdim=True)).numpy()[live][np.argsort(-mean, kind="stable")]
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    left, middle, narrow, right = figure.subplots(1, 4, width_ratios=(1.3, 1, 0.6, 1))
    names = [str(site) for site in activity.sites]
    image = left.imshow(shares, aspect="auto", norm=PowerNorm(0.25, 0, 1), cmap="magma", interpolation="nearest")
    left.set(xlabel="layer", ylabel=f"{live.sum():,} active latents", title="activation of a latent by layer", yticks=[])
    ticks = range(0, len(names), max(len(names) // 9, 1))
    left.set_xticks(list(ticks), [names[tick] for tick in ticks])
    figure.colorbar(image, ax=left, label="share")
    means, distances = mean_layer_histograms(stats)
    middle.stairs(means.density.numpy(), means.edges.numpy(), fill=True, color=COLOURS[0])
    middle.set(xlabel="mean layer of a latent", ylabel="density", title="mean layers")
    narrow.stairs(distances.density.numpy(), distances.edges.numpy(), fill=True, color=COLOURS[0])
    narrow.set(xlabel="to the nearest layer", ylabel="density", title="their distance", xlim=(0, 0.5))
    spread = stats.spread.sum(0).numpy()[1:]
    right.bar(np.arange(1, len(names) + 1), spread / spread.sum(), color=COLOURS[0])
    right.set(xlabel="layers at which it is active at a token", ylabel="share", title="a latent at a token")
    figure.suptitle(about)
    return save_figure(figure, path)


def reconstruction_figure(activity: LayerActivity, costs: Sequence[Fidelity], path: Path, about: str) -> Path:
    """Error of reconstruction by layer, and what it costs the model.

    Args:
        activity: What `layer_activity` returned.
        costs: What `fidelity` returned; may be empty.
        path: Where to write.
        about: For the title.
    """
    figure = Figure(figsize=(9 if costs else 5, 3.4), layout="constrained")
    axes = figure.subplots(1, 2 if costs else 1, squeeze=False)[0]
    rows = activity.metrics()
    names = [str(row["site"]) for row in rows]
    values = np.array([[row["fvu"].value, row["fvu"].low, row["fvu"].high] for row in rows])
    spread = np.nan_to_num(np.abs(values[:, 1:] - values[:, :1])).T
    axes[0].errorbar(names, values[:, 0], spread, marker="o", color=COLOURS[0], label="by coordinate")
    axes[0].plot(names, [row["fvu_mlsae"] for row in rows], marker=".", color=COLOURS[1], label="joint, as published")
    axes[0].set(xlabel="layer", ylabel="share of variance left out", ylim=(0, None))
    axes[0].legend(frameon=False)
    if costs:
        at = [str(cost.site) for cost in costs]
        for colour, name, label in ((COLOURS[2], "delta_loss", "Δ cross-entropy"), (COLOURS[0], "kl", "KL(unedited ‖ edited)")):
            found = np.array([[getattr(cost, name).value, getattr(cost, name).low, getattr(cost, name).high] for cost in costs])
            bars = np.nan_to_num(np.abs(found[:, 1:] - found[:, :1])).T
            axes[1].errorbar(at, found[:, 0], bars, marker="o", color=colour, label=label)
        axes[1].set(xlabel="layer replaced", ylabel="nats per token")
        axes[1].legend(frameon=False)
    for axis in axes:
        axis.tick_params(axis="x", labelsize=8)
    figure.suptitle(about)
    return save_figure(figure, path)


def prompt_figure(activity: PromptActivity, path: Path) -> Path:
    """Latents by layer for one prompt, latest mean layer first."""
    latents, shares = activity.heat_map()
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shares.numpy(), aspect="auto", norm=PowerNorm(0.5, 0, 1), cmap="magma", interpolation="nearest")
    axis.set_xticks(range(len(activity.sites)), [str(site) for site in activity.sites])
    axis.set(xlabel="layer", ylabel=f"{len(latents)} active latents", yticks=[], title=activity.prompt)
    figure.colorbar(image, ax=axis, label="share of a latent's activation")
    return save_figure(figure, path)


def lens_figure(scores: Mapping[str, Sequence[LensScore]], path: Path, about: str) -> Path:
    """KL of lenses by site.

    Args:
        scores: What `evaluate_lens` returned.
        path: Where to write.
        about: For the title.
    """
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axis = figure.subplots()
    for colour, (name, found) in zip(COLOURS, scores.items(), strict=False):
        values = np.array([[score.kl.value, score.kl.low, score.kl.high] for score in found if score.kl.value > 1e-6])
        sites = [_place(score.site) for score in found if score.kl.value > 1e-6]
        spread = np.nan_to_num(np.abs(values[:, 1:] - values[:, :1])).T
        axis.errorbar(sites, values[:, 0], spread, marker="o", color=colour, label=name)
    axis.set(xlabel="site (-1: embed)", ylabel="KL(model ‖ lens), nats per token", yscale="log", title=about)
    axis.legend(frameon=False)
    return save_figure(figure, path)


def _place(site: ResidualSite) -> int:
    return int(site)
