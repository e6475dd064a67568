"""
Text under transport
====================

What does a model write when three of its blocks are replaced by an affine map at every step? Each word is the most likely one; the same
prompt is continued without an edit, with the operator's prediction, and with a copy of the source residual.
"""

# %%
from matplotlib import pyplot as plt

from nnato import Corpus, fit, load_model
from nnato.accumulation import accumulate_cached
from nnato.generation import generate_edited

model = load_model()
accumulated = accumulate_cached(model, Corpus(tokens=8_000, context=128))
PROMPTS = ("The Eiffel Tower is in", "To open a file in Python, you can")
PAIRS = ((12, 15), (9, 12))
operators = {pair: fit(accumulated, [pair])[0].operator for pair in PAIRS}
same: dict[str, list[int]] = {}
for pair in PAIRS:
    for prompt in PROMPTS:
        result = generate_edited(model, prompt, [operators[pair]], interventions=["transport", "identity"], max_new_tokens=12)
        print(f"{pair[0]} → {pair[1]}")
        print(f"  unedited   {prompt + result.unedited.text!r}")
        for name, one in result.edited.items():
            print(f"  {name:10} {prompt + one.text!r}")
            same.setdefault(f"{name}, {pair[0]} → {pair[1]}", []).append(result.same(name))

# %%
figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
width = 0.8 / len(same)
for number, (name, counts) in enumerate(same.items()):
    axes.bar([place + number * width for place in range(len(PROMPTS))], counts, width, label=name)
axes.set_xticks([place + 0.3 for place in range(len(PROMPTS))], PROMPTS, fontsize=8)
axes.set_ylabel("first tokens as unedited, of 12")
axes.legend(fontsize=8)
plt.show()

# %%
# **What this shows.** How long each text stays on the words of the unedited one. Two prompts are an illustration, not a measurement: a
# text leaves its track at the first word that differs, however small the cause. Fitted on 8,000 tokens, these operators are also worse than
# those of ``nnato generate "The Eiffel Tower is in" --transport 12:15``, which reads more text.
