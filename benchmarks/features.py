"""R² of every feature: one matrix product from moments against a loop over features on stored arrays, in CPU time on one thread.

The loop does what the authors' code does for each feature: two products of all rows with its direction, and sums over them.
Moments are made from the same rows, and their cost counts. Ways take turns; medians of the ratios of each turn are reported.
Then the time of the product alone at the width of gemma-2-2b. Prints one JSON object and writes benchmarks/results/features.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

import torch

from nnato.features import quadratic_forms
from nnato.metrics import error_matrix
from nnato.moments import Moments
from nnato.regression import Regression
from nnato.sites import ResidualSite
from nnato.storage import provenance

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


def timed(work, *arguments):
    """CPU seconds and result."""
    began = time.process_time()
    result = work(*arguments)
    return time.process_time() - began, result


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--tokens", type=int, default=10000)
    parser.add_argument("--features", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=3)
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
        loop, want = timed(lambda few=few: by_loop(y, x @ weight + bias, few))
        product, got = timed(by_moments, x, y, weight, bias, directions)
        turns.append((loop * 64, product, float((got[: len(few)] - want).abs().max())))
    wide = torch.nn.functional.normalize(random(16384, 2304), dim=1)
    matrices = [one @ one.T for one in (random(2304, 2304), random(2304, 2304))]
    alone, _ = timed(quadratic_forms, wide, matrices)
    record = {
        "width": d,
        "tokens": n,
        "features": arguments.features,
        "cpu_s, loop (64 times that of every 64th part)": statistics.median(turn[0] for turn in turns),
        "cpu_s, moments": statistics.median(turn[1] for turn in turns),
        "ratio": statistics.median(turn[0] / turn[1] for turn in turns),
        "largest difference": max(turn[2] for turn in turns),
        "cpu_s, R² of 16,384 features at width 2,304 by one product": alone,
        "provenance": provenance(),
    }
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "features.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
