"""
All pairs of blocks
===================

How much of each block's residual does an affine map of an earlier block's explain, and how much of that is more than the skip connection
gives for free? All pairs of seven sites, as in Fig. 3 of the paper, for whole residuals.
"""

# %%
# All operators come from the moments of one pass; those of the :doc:`first page </gallery/plot_01_first_operator>` hold all pairs of these
# sites already.
from pathlib import Path

from nnato import Corpus, fit, load_model
from nnato.accumulation import accumulate_cached
from nnato.plots import r2_heat_maps

model = load_model()
accumulated = accumulate_cached(model, Corpus(tokens=8_000, context=128))
fits = fit(accumulated)
about = f"{accumulated.model['name']}, {sum(accumulated.tokens.values()):,} tokens"
r2_heat_maps(fits, Path("r2.png"), "variance_weighted", about)

# %%
# **What this shows.** For a given target R² falls with the leap, on the left; on the right, how much the operator adds to the identity
# moved by the difference of means. Rows are not strictly comparable: another target is another variance to explain.
#
# With so few test documents the intervals are wide:
for result in sorted(fits, key=lambda one: -one.r2["variance_weighted"])[:5]:
    interval = result.r2_intervals["variance_weighted"]
    print(f"{result.operator.source} → {result.operator.target}: {interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]")

# %%
# In a shell
# ----------
# .. code-block:: console
#
#    $ nnato accumulate --sites all --out moments/
#    $ nnato fit moments/ --out operators/
