"""
A prompt, latent by latent and layer by layer
=============================================

Which latents are active at a prompt, and does one that switches on stay on? The dictionary is the multi-layer sparse autoencoder of
:doc:`the page before </gallery/plot_10_mlsae_layers>`.
"""

# %%
# If that page was run before, its training is finished, and the same call only opens the folder.
import tempfile
import zlib
from pathlib import Path

from nnato import Corpus, load_model
from nnato.models import describe
from nnato.multilayer import load_multilayer
from nnato.sae_training import Recipe, train_sae

model = load_model()
recipe = Recipe(expansion=2, k=32, tokens=3_000, rows=256, buffer=16_384, lr=2e-3)
folder = Path(tempfile.gettempdir()) / f"nnato-gallery-mlsae-{zlib.crc32(repr(recipe).encode()):08x}"
train_sae(model, range(2, 18, 3), recipe, out=folder, corpus=Corpus(tokens=8_000, context=128))
sae = load_multilayer(folder, describe(model))

# %%
# The prompt of the paper's figures. The first token and special ones are not encoded.
from nnato.prompts import prompt_activity

found = prompt_activity(model, sae)
strengths = found.strengths()
for latent in found.strongest(6):
    print(f"latent {latent:>4}:", *(f"{site}: {value:.1f}" for site, value in zip(found.sites, strengths[latent].tolist(), strict=True)))

# %%
# Each line is a latent and its shades add up to one over the layers; latents with the latest mean layer come first.
from nnato.layer_plots import prompt_figure

prompt_figure(found, Path("prompt.png"))

# %%
# The same at the last token only: at how many of the six layers is each of its latents active?
latents, shares = found.heat_map(position=len(found.tokens) - 1)
layers = (shares > 0).sum(1)
print(f"{found.tokens[-1]!r}:", *(f"{int((layers == count).sum())} at {count}" for count in range(1, len(found.sites) + 1)))

# %%
# **What this shows.** A latent is active at one layer or at a few neighbouring ones: read from below, the lines form stairs from early to
# late layers, and at the last token most latents are active at one layer only. ``nnato mlsae prompt mlsae/ --html prompt.html`` writes
# this as a page in which every cell and token can be pointed at.
