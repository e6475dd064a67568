"""
The same on a server
====================

On NDIF the model is elsewhere. What travels is text as token ids and operators; what comes back is sums. This page shows that with a *dry
run*: the very bytes of the request are executed in a fresh process in which nnato cannot be imported. With a key, replace
``DryRunServer`` by ``NdifServer()``. A transcript of a real server is on :doc:`/ndif`.
"""

# %%
import torch
from matplotlib import pyplot as plt

from nnato import Corpus, accumulate, fit, load_model
from nnato.dry_run import DryRunServer

model = load_model()
corpus = Corpus(tokens=5_000, context=128, folds=2)
here = accumulate(model, corpus, [(9, 12)])
with DryRunServer(model.repo_id, torch.float32) as server:
    there = accumulate(model, corpus, [(9, 12)], server=server)
    sent, received = server.sent, server.received

# %%
# The sums of every part, compared bit by bit:
parts = [("train", fold) for fold in here.moments.folds("train")] + [("test", fold) for fold in here.moments.folds("test")]
for split, fold in parts:
    mine, theirs = (one.moments.of(split, "ordinary", [(9, 12)], [fold]) for one in (here, there))
    print(f"{split} {fold}: {mine.n} tokens, equal: {torch.equal(mine.scatter_of(9, 12), theirs.scatter_of(9, 12))}")

# %%
# What travelled, beside what the residuals of this text would have been:
residuals = 2 * 4 * model._module.config.get_text_config().hidden_size * sum(here.tokens.values())
figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
axes.barh(
    ["last request", "last answer", "residuals (not sent)"],
    [sent / 1e6, received / 1e6, residuals / 1e6],
    color=["#2a6f97", "#61a5c2", "#d6d9e0"],
)
axes.set_xlabel(f"MB, for {sum(here.tokens.values()):,} tokens")
axes.set_xscale("log")
axes.invert_yaxis()
plt.show()

# %%
# **What this shows.** The moments are bit-equal to those of a run in this process. The size of an answer depends on the width of the model
# and the pairs, not on the text; that of residuals would grow with it.
print(f"R² of the operator from there: {fit(there)[0].r2['variance_weighted']:.3f}, from here: {fit(here)[0].r2['variance_weighted']:.3f}")
