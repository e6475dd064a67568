"""
One dictionary for all layers
=============================

A multi-layer sparse autoencoder reads the residuals of every layer with one dictionary, so a latent has the same number everywhere, and
one can ask at which layers it is active. A small one is trained here, in less than a minute on two free cores: what it shows is the
way, not the model.
"""

# %%
# One forward pass gives the residuals of all layers; sae_lens' trainer gets them in shuffled order, and nothing is stored. The folder holds
# an SAE in sae_lens' format.
import tempfile
import zlib
from pathlib import Path

from nnato import Corpus, load_model
from nnato.models import describe
from nnato.multilayer import layer_activity, load_multilayer
from nnato.sae_training import Recipe, train_sae

model = load_model()
corpus = Corpus(tokens=8_000, context=128)
recipe = Recipe(expansion=2, k=32, tokens=3_000, rows=256, buffer=16_384, lr=2e-3)
folder = Path(tempfile.gettempdir()) / f"nnato-gallery-mlsae-{zlib.crc32(repr(recipe).encode()):08x}"  # the next page reads it again
trained = train_sae(model, range(2, 18, 3), recipe, out=folder, corpus=corpus)
print(f"{len(trained.sites)} layers, {trained.history[-1]['dead']:.0%} of latents dead at the end of training")

# %%
# Test documents, layer by layer: the share of the variance that the reconstruction leaves out (FVU), with a 95 % interval over folds of
# documents. So few documents have few tokens with large norms, which carry most of the variance of early layers: hence the wide ones.
sae = load_multilayer(folder, describe(model))
activity = layer_activity(model, sae, corpus)
for row in activity.metrics():
    print(f"layer {row['site']:>2}: {row['fvu'].value:.3f} [{row['fvu'].low:.3f}, {row['fvu'].high:.3f}]")

# %%
# Where latents are active.
from nnato.layer_plots import layer_figure

layer_figure(activity, Path("layers.png"), f"gemma-3-270m, python-docs, {activity.stats.tokens:,} test tokens")

# %%
# How much more does the layer of a latent vary over the text than at a token? Exactly, by the law of total variance, counting each active
# pair of token and latent by its activation or all alike; and as the authors' code has it, whose terms are no variances.
from nnato.layer_stats import WEIGHTS, layer_variance_intervals

for weights in WEIGHTS:
    ratio = layer_variance_intervals(activity.folds, weights)["ratio"]
    print(f"{weights:>10}: aggregated over single-token variance {ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]")

# %%
# **What this shows.** With the same sums, the published formula gives a ratio many times the exact one: most of the "two orders of
# magnitude" is its normalisation. How far the exact ratio is above 1 says how much the layers of a latent depend on the token. From more
# text, with more latents: :doc:`/mlsae`.
