"""
The tuned lens is an operator
=============================

A lens reads a residual in the middle of a model as if it were the last one. The logit lens does that as it is; the tuned lens
translates it first, by an affine map: a transport operator to the last block, here shrunk to the identity and in closed form, without
training.
"""

# %%
# The moments of the :doc:`first page </gallery/plot_01_first_operator>` hold the pairs that lead to the last block from six earlier ones.
from nnato import Corpus, load_model
from nnato.accumulation import accumulate_cached
from nnato.lens import fit_lens, logit_lens
from nnato.lens_training import evaluate_lens

model = load_model()
corpus = Corpus(tokens=8_000, context=128)
accumulated = accumulate_cached(model, corpus)
tuned, _ = fit_lens(accumulated)
plain = logit_lens(accumulated.model["blocks"], accumulated.model["d_model"])

# %%
# How far each lens is from what the model predicts in the end, on test documents that the translators have not seen:
scores = evaluate_lens(model, {"logit lens": plain, "tuned lens": tuned}, corpus, sites=(3, 9, 12, 15), sequences=4)
for name, mine in scores.items():
    print(name, *(f"{score.site}: {score.agreement:.0%}" for score in mine))

# %%
from matplotlib import pyplot as plt

figure, axes = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
for name, mine in scores.items():
    middle = [score.kl.value for score in mine]
    ends = [[score.kl.value - score.kl.low for score in mine], [score.kl.high - score.kl.value for score in mine]]
    axes.errorbar([int(score.site) for score in mine], middle, yerr=ends, marker="o", capsize=3, label=name)
axes.set_yscale("log")
axes.set_xlabel("read after block")
axes.set_ylabel("KL from the model's own prediction, nats")
axes.set_title("gemma-3-270m, 4 test sequences × 128 tokens, 95 % intervals", fontsize=10)
axes.legend()
plt.show()

# %%
# **What this shows.** Translated, residuals of every block are nearer to what the model predicts in the end than read as they are; by how
# much, with an interval over few documents. These translators minimise the error of the residual, not the KL;
# ``nnato.lens_training.train_lens`` goes on from there.
