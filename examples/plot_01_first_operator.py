"""
The first operator
==================

An *activation transport operator* is an affine map that predicts the residual stream after one block from the residual of the same token
some blocks earlier. This page fits one from a single pass over text and looks at what it predicts.
"""

# %%
# One pass over text
# ------------------
# The residuals are folded into *moments* while they stream by: counts, means and cross-products in float64. No activation is kept. The
# result is cached, so the pages that follow need no forward passes for it.
from nnato import Corpus, fit, load_model
from nnato.accumulation import accumulate_cached

model = load_model()
corpus = Corpus(tokens=8_000, context=128)
accumulated = accumulate_cached(model, corpus)
accumulated

# %%
# The operator
# ------------
# ``fit`` needs the moments only. The penalty is chosen on validation documents; the R² is of test documents, with a 95 % interval over
# groups of them, beside maps that know less.
(result,) = fit(accumulated, [(9, 12)])
result

# %%
# What it predicts
# ----------------
# The same operator in a trace: read the residuals of a sentence at blocks 9 and 12, and predict one from the other.
import torch

from nnato import ATOTrace

operator = result.operator
text = "The Eiffel Tower is in Paris, and the Colosseum is in Rome."
with torch.no_grad(), ATOTrace(model, text) as t:
    source = t.residual(9).save()
    target = t.residual(12).save()
words = [model.tokenizer.decode([token]) for token in model.tokenizer(text).input_ids]

# %%
# How much of each token's residual is explained, beside block 9 moved by the difference of means: 1 is perfect, 0 is as bad as the mean of
# the training tokens.
from matplotlib import pyplot as plt


def explained(prediction: torch.Tensor) -> list[float]:
    """1 - squared error / squared distance from the mean, for each token but the first."""
    error = (target - prediction)[0, 1:].square().sum(-1)
    return (1 - error / (target[0, 1:] - operator.target_mean.float()).square().sum(-1)).tolist()


moved = source - operator.source_mean.float() + operator.target_mean.float()
figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
places = range(len(words) - 1)
axes.plot(places, explained(operator(source)), marker="o", label="operator 9 → 12")
axes.plot(places, explained(moved), marker="o", label="block 9, moved by the difference of means")
axes.axhline(0, color="black", linewidth=0.8)
axes.set_xticks(places, [word.strip() or "␣" for word in words[1:]], rotation=60)
axes.set_ylabel("share explained")
axes.legend()
axes.set_title("One sentence: block 12 predicted from block 9")
plt.show()

# %%
# **What this shows.** How near each prediction comes to block 12, token by token, on one sentence of another kind than the text the
# operator was fitted on. One sentence is an illustration; the R² above, with its interval, is the measurement.
