"""
Gemma 2 2B
==========

The paper's model, as a recipe. This page was not executed: the weights are gated, and need a GPU or a key for NDIF. The same lines with
``load_model()`` run on the other pages.
"""

# %%
# Accept the terms on the hub and run ``hf auth login`` first. On one GPU, in bfloat16, with the sums on the CPU:
import torch

from nnato import Corpus, NdifServer, ablate, accumulate, fit, load_model

model = load_model("google/gemma-2-2b", dtype=torch.bfloat16)
text = Corpus("monology/pile-uncopyrighted", tokens=250_000)
pairs = [(10, target) for target in range(11, 21)]
moments = accumulate(model, text, pairs, out="moments-gemma-2-2b/", device="cpu")
fits = fit(moments)
results = ablate(model, [one.operator for one in fits], positions="multiple_js")

# %%
# Without a GPU, on NDIF: the same, with a model that has no weights here.
model = load_model("google/gemma-2-2b", remote=True)
moments = accumulate(model, text, pairs, out="moments-gemma-2-2b/", server=NdifServer(say=print))

# %%
# In a shell
# ----------
# .. code-block:: console
#
#    $ nnato accumulate google/gemma-2-2b --source 10 --leap 1-10 --text monology/pile-uncopyrighted --tokens 250000 --out moments/
#    $ nnato fit moments/ --out operators/
#    $ nnato ablate --model google/gemma-2-2b --operator operators/10-12.safetensors --positions multiple_js
