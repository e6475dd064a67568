"""Cost of features in CPU time on one thread: R² from moments against a loop over features, and the pass over test documents.

The loop does what the authors' code does for each feature: two products of all rows with its direction, and sums over them.
Moments are made from the same rows, and their cost counts. Ways take turns; medians of the ratios of each turn are reported.
Then the time of the product alone at the width of gemma-2-2b.

The pass is of 8 operators into block 9 of the embedded model and a JumpReLU dictionary of random directions, whose bars let about 80
latents fire in a token, beside the bare forward pass: up to that block, and of all blocks. Of one token in 32, activations of
predictions are judged too (as in a pass over 131,072 tokens by default), or of all.

Prints one JSON object and writes benchmarks/results/features.json.
"""

from __future__ import annotations

import argparse
import os
import statistics

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

import torch
from accumulation import forward
from common import cpu_seconds, publish

from nnato.blocks import find_blocks
from nnato.dictionaries import Dictionary
from nnato.feature_pass import FeatureStatistic
from nnato.features import quadratic_forms
from nnato.metrics import error_matrix
from nnato.models import load_model
from nnato.moments import Moments
from nnato.operators import TransportOperator
from nnato.reduction import TokenClasses, capture
from nnato.regression import Regression
from nnato.sites import ResidualSite
from nnato.statistics import ResidualBatch

PAIR = ResidualSite(0), ResidualSite(1)


def by_loop(y: torch.Tensor, predicted: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """R² feature by feature."""
    found = []
    for direction in directions:
        a, b = y @ direction, predicted @ direction
        found.append(1 - (a - b).square().sum() / (a - a.mean()).square().sum())
    return torch.stack(found)


def by_moments(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """R² of all features from moments of the rows."""
    moments = Moments.of_pairs([PAIR], x.shape[1])
    moments.update(torch.stack([x, y]))
    rows = Regression.of(moments, PAIR)
    errors, totals = quadratic_forms(directions, [error_matrix(rows, weight, bias), rows.yy])
    return 1 - errors / totals


def in_the_pass(features: int, repeats: int, generator: torch.Generator) -> dict[str, object]:
    """CPU time of the pass over test documents as multiples of bare forward passes, in turns."""
    model, target = load_model(device="cpu"), 9
    layers = find_blocks(model._module)[1]
    sites = tuple(ResidualSite(block) for block in range(target - 8, target + 1))
    ids = torch.randint(300, 200_000, (8, 256), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    special, documents = torch.zeros_like(mask), torch.arange(len(ids))
    residuals = capture(model, ids, sites)
    ordinary = TokenClasses().ordinary(ids, mask, special, residuals)
    rows = [one[ordinary] for one in residuals]
    y, width = rows[-1], rows[-1].shape[1]
    directions = torch.nn.functional.normalize(torch.randn(features, width, generator=generator), dim=1)
    mean = y.mean(0)
    bars = 2.65 * ((y[:512] - mean) @ directions.T).std(0)
    dictionary = Dictionary("jumprelu", directions.T.contiguous(), torch.zeros(features), directions, mean, mean, threshold=bars)
    operators = []
    for site, x in zip(sites[:-1], rows[:-1], strict=True):
        weight = torch.eye(width, dtype=torch.float64) + 0.01 * torch.randn(width, width, generator=generator, dtype=torch.float64)
        operators.append(TransportOperator(site, sites[-1], weight, x.double().mean(0), y.double().mean(0)))

    def sums(sample: int):
        statistic = FeatureStatistic(dictionary, operators, sites, torch.arange(features), 5, sample=sample)
        classes = TokenClasses()

        def run() -> None:
            found = capture(model, ids, sites)
            chosen = classes.ordinary(ids, mask, special, found)
            statistic.update(ResidualBatch(found, sites, chosen, mask & ~chosen, documents, "test", 0, ids))

        return run

    ways = {
        "bare": lambda: forward(model, ids, target, {}),
        "bare, all blocks": lambda: forward(model, ids, layers - 1, {}),
        "one in 32": sums(32),
        "every token": sums(1),
    }
    turns = []
    for turn in range(repeats + 1):
        seconds = {name: cpu_seconds(way)[0] for name, way in (ways.items() if turn % 2 else reversed(ways.items()))}
        if turn:  # the first warms up
            turns.append(seconds)

    def ratio(above: str, below: str) -> list[float]:
        found = sorted(one[above] / one[below] for one in turns)
        return [statistics.median(found), found[0], found[-1]]

    return {
        "features": features,
        "operators": len(operators),
        "target": target,
        "tokens": len(y),
        "active latents in a token": float((dictionary.encode(y) > 0).sum(1).float().mean()),
        "ratio to the bare pass up to the target, one token in 32": ratio("one in 32", "bare"),
        "ratio to the bare pass of all blocks, one token in 32": ratio("one in 32", "bare, all blocks"),
        "ratio to the bare pass up to the target, every token": ratio("every token", "bare"),
    }


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--tokens", type=int, default=10000)
    parser.add_argument("--features", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    d, n = arguments.width, arguments.tokens
    x = random(n, d)
    weight, bias = random(d, d) / d**0.5, random(d)
    y = x @ weight + bias + 0.5 * random(n, d)
    directions = torch.nn.functional.normalize(random(arguments.features, d), dim=1)
    turns = []
    for _ in range(arguments.repeats):
        few = directions[: arguments.features // 64]  # the loop's time is proportional to the number of features
        loop, want = cpu_seconds(lambda few=few: by_loop(y, x @ weight + bias, few))
        product, got = cpu_seconds(lambda: by_moments(x, y, weight, bias, directions))
        turns.append((loop * 64, product, float((got[: len(few)] - want).abs().max())))
    wide = torch.nn.functional.normalize(random(16384, 2304), dim=1)
    matrices = [one @ one.T for one in (random(2304, 2304), random(2304, 2304))]
    alone, _ = cpu_seconds(lambda: quadratic_forms(wide, matrices))
    record = {
        "width": d,
        "tokens": n,
        "features": arguments.features,
        "cpu_s, loop (64 times that of every 64th part)": statistics.median(turn[0] for turn in turns),
        "cpu_s, moments": statistics.median(turn[1] for turn in turns),
        "ratio": statistics.median(turn[0] / turn[1] for turn in turns),
        "largest difference": max(turn[2] for turn in turns),
        "cpu_s, R² of 16,384 features at width 2,304 by one product": alone,
        "pass": in_the_pass(arguments.features, arguments.repeats, generator),
    }
    publish("features", record)


if __name__ == "__main__":
    main()
