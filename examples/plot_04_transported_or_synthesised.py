"""
Transported or synthesised
==========================

Is a feature of the target carried there linearly, or made anew on the way? Two numbers per direction decide: what the operator explains
of it, and what any linear map could. The features are those of a sparse autoencoder that is trained here, in seconds, on the residuals of
two blocks together: small, far from converged, and named as what it is.
"""

# %%
import tempfile
from pathlib import Path

from nnato import Corpus, evaluate_features, load_dictionary, load_model
from nnato.accumulation import accumulate_cached
from nnato.sae_training import Recipe, train_sae

model = load_model()
corpus = Corpus(tokens=8_000, context=128)
accumulated = accumulate_cached(model, corpus)
recipe = Recipe(expansion=2, k=32, tokens=12_000, rows=256, buffer=8_192, lr=2e-3, dead_tokens=2_000)
with tempfile.TemporaryDirectory() as folder:
    trained = train_sae(model, [6, 9], recipe, out=folder, corpus=Corpus(tokens=20_000, context=128))
    dictionary = load_dictionary(folder)
for site, left_out in trained.history[-1]["fvu"].items():
    print(f"block {site}: {left_out:.0%} of the variance was left out just before the end")

# %%
# Every latent's decoder direction is judged from the moments alone, for every source of the two targets; and 512 random directions beside
# them, the control. The verdicts allow for the number of directions: at most 5 % of those called transported, or synthesised, are expected
# to be false.
pairs = [pair for pair in accumulated.moments.pairs if pair[1] in (6, 9)]
results = evaluate_features(accumulated, dictionary, pairs)
for result in results:
    print(f"{result.pair[0]} → {result.pair[1]}: {dict(result.verdicts.counts())}")

# %%
# The distribution over features by leap, and the mean for every source and target: what Fig. 2 and Fig. 3 of the paper show, here of all
# tokens rather than of those where a feature is active.
from matplotlib import pyplot as plt

from nnato.feature_plots import mean_grid, r2_distributions, trajectories

about = "gemma-3-270m, 8,000 tokens"
paths = [
    r2_distributions(results, Path("features_by_leap.png"), about),
    mean_grid(results, Path("features_mean.png"), about),
    trajectories([one for one in results if one.pair[1] == 9], Path("features_trajectories.png"), about),
]
for path in paths:
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.imshow(plt.imread(path))
    axes.axis("off")
    path.unlink()
plt.show()

# %%
# **What this shows.** TODO
