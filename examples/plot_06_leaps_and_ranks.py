"""
Leaps and ranks
===============

Does any operator beat copying the source residual, in what the model makes of it? Leaps 1 to 8 into one block of two models, operators of
several ranks, with intervals (the paper's Fig. 5). These measurements take too long for a page: ``benchmarks/leaps.py`` made them, its
results are in ``benchmarks/results``, and this page draws them.
"""

# %%
import json
from pathlib import Path

from matplotlib import pyplot as plt

RESULTS = Path.cwd().parent / "benchmarks" / "results"
STYLES = {
    "transport": ("ridge", "#2a6f97", "-"),
    "rank_256": ("ridge of rank 256", "#468faf", "--"),
    "rank_64": ("ridge of rank 64", "#61a5c2", "--"),
    "rank_8": ("ridge of rank 8", "#a9d6e5", "--"),
    "identity_shift": ("identity, moved to the mean", "#c97b2b", "-"),
    "identity": ("identity", "#e09f3e", "-"),
}


def panel(axes, record: dict, measure: str, base: float = 0.0) -> None:
    """One measure against the leap, a line per map, with 95 % intervals."""
    for number, (name, (label, colour, line)) in enumerate(STYLES.items()):
        rows = sorted((row for row in record["rows"] if row["put_in"] == name), key=lambda row: row["leap"])
        values = [row[measure] for row in rows]
        middle = [value["value"] + base for value in values]
        ends = [[value["value"] - value["low"] for value in values], [value["high"] - value["value"] for value in values]]
        places = [row["leap"] + 0.05 * number for row in rows]
        axes.errorbar(
            places, middle, yerr=ends, label=label, color=colour, linestyle=line, marker="o", markersize=3, capsize=2, linewidth=1.2
        )
    axes.set_xlabel(f"leap into block {record['target']}")


def draw(name: str) -> dict:
    """Log-perplexity over all predictions, and KL from the first edit on."""
    record = json.loads((RESULTS / f"{name}.json").read_text())
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    panel(left, record, "delta_loss_diluted", record["log_perplexity"])
    left.axhline(record["log_perplexity"], color="black", linewidth=1)
    for row, line in zip(record["references"], (":", "--", "-."), strict=True):
        left.axhline(row["log_perplexity"], color="grey", linewidth=1, linestyle=line, label=row["put_in"])
    left.set_ylabel("log-perplexity, nats (line: unedited)")
    left.legend(fontsize=7)
    panel(right, record, "kl")
    right.set_yscale("log")
    right.set_ylabel("KL from the first edit on, nats (log scale)")
    how = f"{record['positions']}, {record['sequences']} sequences of {record['documents']} documents, {record['tokens']:,} tokens"
    figure.suptitle(f"{record['about']} · {how}, seed {record['seeds'][0]}, 95 % intervals", fontsize=9)
    plt.show()
    return record


gemma = draw("leaps-gemma-3-270m")

# %%
smollm2 = draw("leaps-smollm2")

# %%
# Ridge against the copy, paired on the same sequences: how much more KL the identity costs.
for record in (gemma, smollm2):
    print(record["about"])
    for row in record["rows"]:
        if row["put_in"] == "identity":
            more = row["kl_minus_transport"]
            print(f"  leap {row['leap']}: {more['value']:+.4f} [{more['low']:.4f}, {more['high']:.4f}] nats")

# %%
# **What this shows.** The full operator loses least at every leap on both models; ranks cost more the lower they are, and the plain copy
# falls behind with the leap. One target block of each model, one kind of text, and 16 documents: the order is more certain than the sizes.
# All numbers, with those of further operators, are in :doc:`/causal`.
