"""
Three ways to be fooled
=======================

Simulations on independent data, in which nothing is transported: how a special token makes an R² of 0.98, how canonical correlations find
structure in noise, and why a participation ratio says little. Why nnato reports what it reports.
"""

# %%
# A constant token ---------------- Source and target are independent noise. Then one token in sixteen is replaced by a constant vector of
# large norm, as the first token of every sequence is in most models.
import torch
from matplotlib import pyplot as plt

torch.manual_seed(0)
WIDTH, TOKENS = 32, 4096


def r2(x: torch.Tensor, y: torch.Tensor) -> float:
    """R² of least squares fitted on the first half and judged on the second."""
    half = len(x) // 2
    one = torch.ones(len(x), 1, dtype=x.dtype)
    weight = torch.linalg.lstsq(torch.cat([x, one], 1)[:half], y[:half]).solution
    error = y[half:] - torch.cat([x, one], 1)[half:] @ weight
    return 1 - float(error.square().sum() / (y[half:] - y[half:].mean(0)).square().sum())


x, y = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
norms = (0, 5, 10, 20, 40, 80, 160)
scores = []
for norm in norms:
    first = torch.zeros(TOKENS, 1, dtype=torch.bool)
    first[::16] = norm > 0
    constant = torch.full((WIDTH,), norm / WIDTH**0.5, dtype=torch.float64)
    scores.append(r2(torch.where(first, constant, x), torch.where(first, constant, y)))

# %%
# Correlations in noise, and a ratio that does not see them
# ----------------------------------------------------------
# The sum of squared canonical correlations of *independent* data, in sample: about d² / n, all of it chance.
from nnato.cca import participation_ratio

sizes = (64, 128, 256, 512, 1024, 2048, 4096)
found = []
for size in sizes:
    a, b = (data[:size] - data[:size].mean(0) for data in (x, y))
    found.append(torch.linalg.svdvals(torch.linalg.qr(a)[0].T @ torch.linalg.qr(b)[0]))

# %%
figure, (one, two, three) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
one.plot(norms, scores, marker="o")
one.set_xlabel("norm of a constant token, one in 16")
one.set_ylabel("held-out R²")
one.set_title("independent data: R²", fontsize=10)
two.plot(sizes, [float(rho.square().sum()) for rho in found], marker="o", label="Σρ² in sample")
two.plot(sizes, [WIDTH**2 / size for size in sizes], linestyle="--", label="d² / n")
two.axhline(0, color="black", linewidth=0.8, label="truth")
two.set_xscale("log")
two.set_xlabel("tokens")
two.set_title(f"independent data, d = {WIDTH}: ceiling", fontsize=10)
two.legend(fontsize=8)
three.plot(sizes, [float(participation_ratio(rho)) for rho in found], marker="o")
three.axhline(64 / (9 * torch.pi**2) * WIDTH, color="grey", linestyle="--", label="0.72 d")
three.set_ylim(0, WIDTH)
three.set_xscale("log")
three.set_xlabel("tokens")
three.set_title("independent data: participation ratio", fontsize=10)
three.legend(fontsize=8)
plt.show()

# %%
# **What this shows.** All three would be read as transport, and there is none. So nnato leaves special tokens and sinks out and reports
# both numbers, corrects the ceiling for chance, and prints the paper's participation ratio beside its value for unrelated documents
# (:doc:`/statistics`).
