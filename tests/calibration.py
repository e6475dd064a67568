"""How often intervals hold the truth, and how often p-values call nothing something: simulations of everything that nnato reports.

As a script it prints the table of docs/reliability.md; `test_calibration.py` holds the numbers. 200 runs each, of documents whose tokens
or sequences are alike: what is nominally 95 % is asked of the estimators as the package uses them, with as few documents as a user has.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from test_efficiency import PAIR, rows_of

from nnato.effects import Bootstrap, sign_test
from nnato.efficiency import efficiency
from nnato.fidelity import _mean
from nnato.intervals import Interval, share_explained
from nnato.latent_transport import LatentTransport, _pair_sums
from nnato.layer_stats import LayerStats, layer_variance, layer_variance_intervals
from nnato.sums import PairSums

RUNS = 200
Found = dict[str, float]
"""By estimator the share of runs that hold the truth, or of those below 5 %."""


def autocorrelated(rng: np.random.Generator, documents: int, length: int = 64, by: float = 0.8) -> np.ndarray:
    """A series for each document, of unit variance, (documents, length)."""
    noise = rng.normal(size=(documents, length))
    noise[:, 1:] *= np.sqrt(1 - by**2)
    for step in range(1, length):
        noise[:, step] += by * noise[:, step - 1]
    return noise


def holds(interval: Interval, truth: float) -> bool:
    """Whether it does."""
    return bool(interval.low <= truth <= interval.high)


def folds_of(values: np.ndarray, folds: int) -> torch.Tensor:
    """Sums over the documents of each fold, float64 (folds,)."""
    return torch.from_numpy(values.sum(1).reshape(folds, -1).sum(1))


def scores() -> Found:
    """R², skill over another map, and of a feature R² with its p-value, from folds of 60 documents with autocorrelated tokens."""
    found: Found = {}
    for folds in (5, 10):
        rng, count = np.random.default_rng(folds), np.zeros(4)
        for _ in range(RUNS):
            x, e = autocorrelated(rng, 60), 0.5 * autocorrelated(rng, 60)
            y = x + e
            errors = folds_of(e**2, folds)
            skill = share_explained(errors, folds_of((y - 0.5 * x) ** 2, folds))
            parts = [(y[at::folds].reshape(-1, 1), x[at::folds].reshape(-1, 1)) for at in range(folds)]
            feature = PairSums.stack([PairSums.of(*map(torch.from_numpy, part)) for part in parts]).r2()
            truths = holds(share_explained(errors, folds_of((y - y.mean()) ** 2, folds)), 0.8), holds(skill, 0.5)
            count += [*truths, holds(feature[0], 0.8), float(feature.above(0.8)[0]) < 0.05]
        for name, share in zip(("R²", "skill", "R² of a feature", "its p-value, null, at 5 %"), count / RUNS, strict=True):
            found[f"{name}, {folds} folds"] = float(share)
    return found


def changes(rng: np.random.Generator, whose: np.ndarray, mean: float) -> np.ndarray:
    """A number for each sequence, with a part that all sequences of a document share."""
    return mean + rng.normal(size=whose.max() + 1)[whose] + rng.normal(size=len(whose))


def ablations() -> Found:
    """Means, ratios, loss recovered and the sign test over documents of 1 to 4 sequences."""
    found: Found = {}
    for documents in (12, 24):
        rng, count = np.random.default_rng(documents), np.zeros(4)
        for trial in range(RUNS):
            whose = np.repeat(np.arange(documents), rng.integers(1, 5, documents))
            bootstrap, lost, tokens = Bootstrap(whose, trial), changes(rng, whose, 1.0), rng.integers(5, 40, len(whose)).astype(float)
            recovered = bootstrap.recovered(lost, 4 + lost + changes(rng, whose, 0.0))
            held = holds(bootstrap.interval(lost), 1.0), holds(bootstrap.ratio(lost * tokens, tokens), 1.0), holds(recovered, 0.8)
            count += [*held, sign_test(bootstrap.by_document(changes(rng, whose, 0.0))) < 0.05]
        names = ("Δloss, KL, agreement", "the same by distance", "loss recovered", "sign test, null, at 5 %")
        for name, share in zip(names, count / RUNS, strict=True):
            found[f"{name}, {documents} documents"] = float(share)
    return found


def means() -> Found:
    """Skewed costs per token of 16 sequences, each of its own document: a lens' KL, what a reconstruction costs, cosines of layers."""
    rng, count = np.random.default_rng(1), 0
    for _ in range(RUNS):
        tokens = rng.integers(20, 120, 16).astype(float)
        costs = np.array([(rng.exponential(size=int(one)) * np.exp(0.5 * rng.normal() - 0.125)).sum() for one in tokens])
        count += holds(_mean(torch.from_numpy(costs), torch.from_numpy(tokens)), 1.0)
    return {"KL of a lens, costs of a reconstruction, cosines, 16 documents": count / RUNS}


def ceilings() -> Found:
    """Debiased Σρ² and efficiency of a linear system of known canonical correlations."""
    count, width = np.zeros(2), 4
    # Of what test_efficiency.linear draws: x has variance 1 + 0.5² in each coordinate, the noise 0.5².
    mix = np.random.default_rng(11).normal(size=(width, width)) * np.logspace(0, -1, width)
    signal = (1 + 0.5**2) * mix.T @ mix
    truth = float(np.trace(np.linalg.solve(signal + 0.25 * np.eye(width), signal)))
    for seed in range(RUNS):
        rows, _ = rows_of(np.random.default_rng(seed), (200, 60, 100), width=width, documents=0.5)
        got = efficiency(PAIR, rows, ranks=[width])
        count += [holds(got.sum_debiased, truth), holds(got.points[0].efficiency, 1.0)]
    return {"Σρ² debiased, 10 folds": count[0] / RUNS, "efficiency, 10 folds": count[1] / RUNS}


def layers() -> Found:
    """The variance of the layer: latents that prefer a layer, which each document moves a little; 10 folds of 6 documents."""
    prefers = torch.linspace(0.2, 2.8, 8)
    names = ("total", "aggregated", "single", "ratio", "share")

    def fold(generator: torch.Generator, documents: int) -> LayerStats:
        stats = LayerStats((0, 1, 2, 3), 8)
        for _ in range(documents):
            moved = prefers + 0.3 * torch.randn(8, generator=generator)
            near = torch.exp(-((torch.arange(4)[:, None, None] - moved) ** 2))  # (layers, 1, latents)
            values = near * (torch.rand(4, 20, 8, generator=generator) - 0.4).relu()
            stats.add(values, torch.arange(8).expand(4, 20, 8))
        return stats

    whole = layer_variance(fold(torch.Generator().manual_seed(10**6), 4000))
    count = dict.fromkeys(names, 0)
    for seed in range(RUNS):
        generator = torch.Generator().manual_seed(seed)
        found = layer_variance_intervals([fold(generator, 6) for _ in range(10)])
        for name in names:
            count[name] += holds(found[name], getattr(whole, name))
    return {f"variance of the layer, {name}, 10 folds": count[name] / RUNS for name in names}


def coincidences() -> Found:
    """Spearman's correlation of persistence and R² over 40 latents, as it would be over endless text; 10 folds of 400 tokens."""
    draw = np.random.default_rng(5)
    rate, noise = draw.uniform(0.3, 0.7, 40), draw.uniform(0.1, 1.5, 40)

    def sums(rng: np.random.Generator, tokens: int) -> torch.Tensor:
        on = rng.random((tokens, 40)) < rate
        x = on * (1 + rng.random((tokens, 40)))
        stays = rng.random((tokens, 40)) < 1 - 0.5 * noise / 1.5
        y = on * stays * (x + 0.2 * noise * rng.random((tokens, 40)))
        return _pair_sums(*map(torch.from_numpy, (x, y, 0.9 * x)))

    def coincidence(rng: np.random.Generator, folds: int, tokens: int) -> list[Interval]:
        parts = torch.stack([sums(rng, tokens) for _ in range(folds)])[:, None]
        got = LatentTransport((PAIR,), (tokens,) * folds, parts).coincidence(PAIR)
        return [got.correlation, got.partial]

    truths = [one.value for one in coincidence(np.random.default_rng(6), 1, 200_000)]
    count = np.zeros(2)
    for seed in range(RUNS):
        count += [holds(*one) for one in zip(coincidence(np.random.default_rng(100 + seed), 10, 400), truths, strict=True)]
    return {"persistence and R², correlation, 10 folds": count[0] / RUNS, "the same, partial, 10 folds": count[1] / RUNS}


SIMULATIONS: tuple[Callable[[], Found], ...] = (scores, ablations, means, ceilings, layers, coincidences)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"| of | nominal | found, {RUNS} runs |\n|---|---|---|")
    for simulation in SIMULATIONS:
        for name, share in simulation().items():
            print(f"| {name} | {'≤ 5 %' if 'null' in name else '95 %'} | {share:.1%} |", flush=True)
