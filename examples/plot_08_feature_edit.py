"""
An edit within a few directions
===============================

Replacing a whole residual is a blunt instrument. A *feature-targeted* edit moves only what lies along chosen directions to where the
operator predicts it, and leaves the orthogonal complement as it is. The directions are usually decoder vectors of a dictionary; here they
are the unembedding vectors of a few words, so that the page needs none.
"""

# %%
import torch
from matplotlib import pyplot as plt

from nnato import Corpus, ablate, fit, load_model
from nnato.accumulation import accumulate_cached

WORDS = (" the", " a", " is", " of", " to", " and", " in", " that")
model = load_model()
corpus = Corpus(tokens=8_000, context=128)
accumulated = accumulate_cached(model, corpus)
(fitted,) = fit(accumulated, [(12, 15)])
tokens = [model.tokenizer(word, add_special_tokens=False).input_ids[0] for word in WORDS]
directions = model._module.get_output_embeddings().weight[tokens].double()
directions = directions / directions.norm(dim=1, keepdim=True)

# %%
# How much of the variance of block 15 lies along these eight directions, and how much of it the operator explains:
from nnato.controls import rows

test = rows(accumulated, "test", fitted.operator.pair)
basis = torch.linalg.qr(directions.T)[0]
share = float(torch.trace(basis.T @ test.yy @ basis) / torch.trace(test.yy))
print(f"{share:.2%} of the variance in {len(WORDS)} of {directions.shape[1]} dimensions")

# %%
# The same positions, edited along these directions only, and as a whole:
names = ["features", "transport", "mean"]
(result,) = ablate(model, [fitted.operator], corpus, sequences=8, interventions=names, features=directions)
result

# %%
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
labels = {"features": "ŷ along 8 directions", "transport": "ŷ as a whole", "mean": "the mean"}
values = [result.effects[name].kl_interval for name in names]
ends = [[one.value - one.low for one in values], [one.high - one.value for one in values]]
axes.barh([labels[name] for name in names], [one.value for one in values], xerr=ends, capsize=3, color=["#468faf", "#2a6f97", "#8d99ae"])
axes.set_xscale("log")
axes.invert_yaxis()
axes.set_xlabel("KL from the first edit on, nats (log scale)")
axes.set_title("12 → 15, five positions of 8 sequences, 95 % intervals", fontsize=10)
plt.show()

# %%
# **What this shows.** The directions hold a small part of the variance, and moving them alone already makes up a good part of the KL of the
# whole edit: what lies along the unembedding vectors of frequent words is read off directly. The intervals of the two overlap. In a shell:
# ``nnato ablate --interventions features --features FILE``.
