"""
Transported or synthesised
==========================

Is a feature of the target carried there linearly, or made anew on the way? Two numbers per direction decide: what the operator explains
of it, and what any linear map could. Features are usually those of a sparse autoencoder; here, so that the page needs none, a
dictionary is made whose directions are the unembedding vectors of 400 tokens of the text.
"""

# %%
import torch

from nnato import Corpus, load_model
from nnato.accumulation import accumulate_cached, tokenize
from nnato.dictionaries import Dictionary
from nnato.features import evaluate_features

model = load_model()
corpus = Corpus(tokens=8_000, context=128)
accumulated = accumulate_cached(model, corpus)
seen = tokenize(model, corpus).batch([0, 1, 2, 3, 4, 5, 6, 7, 8, 9]).ids.unique()[:400]
unembedding = model._module.get_output_embeddings().weight.detach()[seen].float()
zeros = torch.zeros(unembedding.shape[1])
dictionary = Dictionary(
    kind="relu", W_enc=unembedding.T.contiguous(), b_enc=torch.zeros(len(seen)), W_dec=unembedding, b_dec=zeros, shift=zeros
)

# %%
# Every direction is judged from the moments alone; and 512 random directions beside them, the control. The verdicts allow for the number of
# directions: at most 5 % of those called transported, or synthesised, are expected to be false.
results = evaluate_features(accumulated, dictionary, [(12, 15), (3, 15)])
for result in results:
    print(f"{result.pair[0]} → {result.pair[1]}: {result.verdicts.counts()}")

# %%
from matplotlib import pyplot as plt

figure, panels = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained", sharey=True)
for axes, result in zip(panels, results, strict=True):
    for name, scores, colour in (("random", result.random, "#c9ced6"), ("unembedding", result.scores, "#2a6f97")):
        axes.scatter(scores.ceiling.value, scores.r2["transport"].value, s=9, color=colour, label=f"{name} directions")
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    axes.axhline(result.thresholds.high, color="#468faf", linestyle=":", linewidth=1)
    axes.axvline(result.thresholds.low, color="#bc4749", linestyle=":", linewidth=1)
    axes.set_xlabel("debiased ceiling: what any linear map could explain")
    axes.set_title(f"{result.pair[0]} → {result.pair[1]}", fontsize=10)
panels[0].set_ylabel("held-out R² of the operator")
panels[0].legend(fontsize=8)
plt.show()

# %%
# **What this shows.** From block 12 nearly all of these directions can be called transported (above the dotted line, with certainty);
# from block 3 a few can, none is called synthesised, and of most 5,000 training tokens do not tell. The directions in which the model
# reads its predictions are carried better than random ones. A dot below the diagonal has a ceiling that the operator does not reach: with
# more text it comes nearer.
