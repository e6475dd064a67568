"""
Ceiling and efficiency
======================

How much could *any* affine map carry, and how much of that does an operator of rank r carry? Canonical correlations of source and target
give the ceiling; corrected for what chance gives in so many dimensions, they say how large the transported part is. The paper's Fig. 4,
with intervals.
"""

# %%
# Eight thousand tokens are few for 640 dimensions. ``transport_efficiency`` refuses fewer than five effective tokens per dimension, because
# then nearly all of a correlation in sample is chance.
from pathlib import Path

from nnato import Corpus, load_model, transport_efficiency
from nnato.accumulation import accumulate_cached
from nnato.plots import correlation_spectra, efficiency_curves

model = load_model()
accumulated = accumulate_cached(model, Corpus(tokens=8_000, context=128))
results = transport_efficiency(accumulated, [(9, 12), (3, 12)], ranks=(1, 4, 16, 64, 160, 320, 640))
about = f"{accumulated.model['name']}, {sum(accumulated.tokens.values()):,} tokens"
efficiency_curves(results, Path("efficiency.png"), about)

# %%
# **What this shows.** On the right the ceiling in sample (dotted) lies far above the debiased one (dashed): that gap is chance, and it is
# wide because the text is small. On the left, what the operators reach of the debiased ceiling: about 0.7. What is missing from 1 is the
# cost of little text, not a property of the model; with 31,200 training tokens it is 0.85 to 0.97 (:doc:`/statistics`).
correlation_spectra(results, Path("spectra.png"), about)

# %%
# The spectra behind it: canonical correlations in sample and debiased, those of *unrelated documents* (shuffled), and the edge that noise
# reaches. Only what is above the edge belongs to the transport subspace.
results[0]
