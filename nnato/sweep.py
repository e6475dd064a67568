"""Multi-layer SAEs of several sizes: one training and one pass over the test documents for each, in a table."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nnato.accumulation import tokenize
from nnato.corpus import Corpus, TokenBlocks
from nnato.errors import DictionaryError
from nnato.layer_stats import LayerStats, layer_distributions, layer_variance
from nnato.lens import Lens
from nnato.models import describe
from nnato.multilayer import layer_activity, load_multilayer
from nnato.sae_training import Recipe, default_corpus, train_sae
from nnato.sites import ResidualSite
from nnato.statistics import Progress
from nnato.storage import prepare_folder

if TYPE_CHECKING:
    from nnato.nnsight_setup import TransformersModel


def deviations(stats: LayerStats) -> dict[str, float]:
    """How far the layer of a latent spreads, over the latents that were active.

    Returns:
        Of the standard deviation of a latent's layer: `std_mean`, `std_var` (unbiased), `std_std`, `std_sem` (of the mean), and the same
        with `rel` for `std`, of the deviation over the number of layers from the first one read to the last. NaN where there are too few
        latents.
    """
    found = layer_distributions(stats)["std"]
    live = found[~found.isnan()]
    row: dict[str, float] = {}
    for name, values in (("std", live), ("rel", live / (stats.layers[-1] - stats.layers[0] + 1))):
        variance = float(values.var()) if len(values) > 1 else math.nan
        mean = float(values.mean()) if len(values) else math.nan
        spread = math.sqrt(variance)
        numbers = {"mean": mean, "var": variance, "std": spread, "sem": spread / math.sqrt(max(len(values), 1))}
        row |= {f"{name}_{what}": number for what, number in numbers.items()}
    return row


def sweep(
    model: TransformersModel,
    expansions: Sequence[int],
    ks: Sequence[int],
    recipe: Recipe | None = None,
    *,
    out: str | Path,
    sites: Sequence[int | str | ResidualSite] | None = None,
    corpus: Corpus | TokenBlocks | None = None,
    lens: Lens | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Iterator[dict[str, Any]]:
    """Train a multi-layer SAE of every size, and read the test documents with it; the same call goes on where one was interrupted.

    Args:
        model: The model.
        expansions: Latents for each dimension of the residual stream.
        ks: Active latents.
        recipe: Everything else about the training.
        out: A folder; each SAE has a folder in it.
        sites: Layers; all blocks by default.
        corpus: The text, tokenised already or not; by default as much of the embedded one as the recipe asks for.
        lens: As in `train_sae`.
        batch_size: Token blocks per forward pass.
        progress: Told of tokens read and rows trained on.

    Returns:
        An iterator over rows, as each is done: `expansion`, `k`, `latents`, `path`, `tokens` (of test documents), `dead` (share of latents
        never active in these), `fvu` and `l0` (means over layers), `ratio` and `share` (of the variance of the layer, by activation), and
        what `deviations` gives.

    Raises:
        DictionaryError: A size is none, or `out` holds another training. Everything else as `train_sae` and `layer_activity`.
    """
    recipe, width = recipe or Recipe(), describe(model).d_model
    if not expansions or not ks:
        raise DictionaryError("a sweep needs at least one expansion and one k")
    recipes = [replace(recipe, expansion=expansion, k=k) for expansion, k in itertools.product(expansions, ks)]
    for one in recipes:
        if one.k > one.expansion * width:
            raise DictionaryError(f"k {one.k} is more than {one.expansion * width} latents: leave it out, or expansion {one.expansion}")
    folder = prepare_folder(Path(out).expanduser())
    blocks = tokenize(model, corpus or default_corpus(recipe), progress)
    for one in recipes:
        path = folder / f"x{one.expansion}-k{one.k}"
        train_sae(model, sites, one, out=path, corpus=blocks, lens=lens, batch_size=batch_size, progress=progress)
        sae = load_multilayer(path, describe(model))
        activity = layer_activity(model, sae, blocks, out=path, batch_size=batch_size, progress=progress)
        metrics, variance = activity.metrics(), layer_variance(activity.stats)
        yield {
            "expansion": one.expansion,
            "k": one.k,
            "latents": sae.latents,
            "path": str(path),
            "tokens": activity.stats.tokens,
            "dead": float((activity.stats.total.sum(1) == 0).double().mean()),
            "fvu": float(torch.tensor([row["fvu"].value for row in metrics], dtype=torch.float64).mean()),
            "l0": float(torch.tensor([row["l0"] for row in metrics], dtype=torch.float64).mean()),
            "ratio": variance.ratio,
            "share": variance.share,
            **deviations(activity.stats),
        }
