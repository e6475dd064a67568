"""From stored activations to a chosen ridge operator: scikit-learn and himalaya against moments, in CPU time and peak memory.

`GridSearchCV(Ridge)` and himalaya's `RidgeCV` with one penalty for all targets.

The paper's 8 penalties and 5 folds, contiguous as there. Each run is a process of its own on one thread; they take turns, and the
medians of the ratios of each turn are reported. Prints one JSON object and writes benchmarks/results/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FOLDS = 5
CHUNK = 1024


def make(folder: Path, d: int, n: int) -> None:
    """Write activations of a source and a target with decaying spectra and a dominant coordinate, float32."""
    import numpy as np

    rng = np.random.default_rng(0)
    mix = rng.normal(size=(d, d)).astype(np.float32) / np.float32(d**0.5)
    scales = np.logspace(0, -2, d).astype(np.float32)
    scales[0] = 20
    x, y = (np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, (n, d)) for name in "xy")
    for first in range(0, n, CHUNK):
        rows = slice(first, min(n, first + CHUNK))
        x[rows] = (rng.standard_normal((rows.stop - first, d), np.float32) * scales) @ mix + 1
        y[rows] = x[rows] @ mix.T * np.float32(0.7) + rng.standard_normal((rows.stop - first, d), np.float32) * scales
    x.flush()
    y.flush()


def by_scikit_learn(folder: Path) -> float:
    """The penalty that a grid search over whole arrays chooses."""
    import numpy as np
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV, KFold

    from nnato.selection import PAPER_ALPHAS

    x, y = (np.load(folder / f"{name}.npy") for name in "xy")
    search = GridSearchCV(Ridge(), {"alpha": list(PAPER_ALPHAS)}, cv=KFold(FOLDS), scoring="r2").fit(x, y)
    return float(search.best_params_["alpha"])


def by_himalaya(folder: Path) -> float:
    """The penalty that himalaya's cross-validated ridge chooses, one for all targets, from whole arrays."""
    import numpy as np
    from himalaya.ridge import RidgeCV
    from himalaya.scoring import r2_score
    from sklearn.model_selection import KFold

    from nnato.selection import PAPER_ALPHAS

    x, y = (np.load(folder / f"{name}.npy") for name in "xy")
    how = {"local_alpha": False, "score_func": r2_score}
    search = RidgeCV(alphas=list(PAPER_ALPHAS), fit_intercept=True, cv=KFold(FOLDS), solver_params=how).fit(x, y)
    return min(PAPER_ALPHAS, key=lambda alpha: abs(alpha - float(search.best_alphas_[0])))  # it computes in float32


def by_moments(folder: Path, products: str = "float64", search: str = "full") -> float:
    """The penalty chosen from moments of folds, read in chunks, with products of this dtype and float64 sums."""
    import dataclasses

    import numpy as np
    import torch

    from nnato.moments import Moments
    from nnato.regression import Regression
    from nnato.selection import Method, Solver
    from nnato.sites import ResidualSite

    pair = ResidualSite(0), ResidualSite(1)
    files = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in "xy"]
    (n, width), offset = files[0].shape, files[0].offset
    folds = []
    for part in np.array_split(np.arange(n), FOLDS):
        moments = Moments.of_pairs([pair], width, products=getattr(torch, products))
        for first in range(part[0], part[-1] + 1, CHUNK):
            rows = min(part[-1] + 1, first + CHUNK) - first
            place = {"count": rows * width, "offset": offset + first * width * 4}
            chunk = [np.fromfile(folder / f"{name}.npy", np.float32, **place).reshape(rows, width) for name in "xy"]
            moments.update(torch.from_numpy(np.stack(chunk)))
        folds.append(Regression.of(moments, pair))
    method = dataclasses.replace(Method.paper(), search=search)
    return Solver(method).solve(Regression.merge(folds), folds=folds).alpha


ROLES = {
    "scikit-learn": by_scikit_learn,
    "himalaya": by_himalaya,
    "moments": by_moments,
    "moments, float32 products": lambda folder: by_moments(folder, "float32"),
    "moments, screened": lambda folder: by_moments(folder, search="screened"),
    "moments, float32 products, screened": lambda folder: by_moments(folder, "float32", "screened"),
}


def resident(which: str) -> float:
    """Resident memory of this process in MiB: now (VmRSS), or at its peak (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) / 1024


def run(role: str, folder: Path) -> dict[str, float]:
    """One run in a process of its own: CPU seconds, peak memory and the chosen penalty."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--role", role, "--data", str(folder)]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="576x100000x5,2304x20000x5", help="width x tokens x repeats, …")
    parser.add_argument("--name", default="solvers", help="of the file in benchmarks/results")
    parser.add_argument("--only", help="of the ways, these besides scikit-learn, separated by ;  [default: all]")
    parser.add_argument("--role", choices=list(ROLES), help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        with tempfile.TemporaryDirectory() as small:  # libraries load what they use on first use: not part of the measurement
            make(Path(small), 16, 500)
            ROLES[arguments.role](Path(small))
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        idle = resident("VmRSS")
        began = time.process_time()
        alpha = ROLES[arguments.role](arguments.data)
        cpu = time.process_time() - began
        print(json.dumps({"alpha": alpha, "cpu_s": cpu, "peak_mib": resident("VmHWM") - idle}))
        return

    roles = ["scikit-learn", *arguments.only.split(";")] if arguments.only else list(ROLES)
    record: dict[str, object] = {"penalties": 8, "folds": FOLDS, "sizes": []}
    for size in arguments.sizes.split(","):
        d, n, repeats = (int(part) for part in size.split("x"))
        with tempfile.TemporaryDirectory() as scratch:
            make(Path(scratch), d, n)
            turns = [{role: run(role, Path(scratch)) for role in roles} for _ in range(repeats)]
        chosen = {turn[role]["alpha"] for turn in turns for role in roles}
        if len(chosen) != 1:
            raise SystemExit(f"different penalties were chosen: {turns}")
        entry = {"d_model": d, "tokens": n, "repeats": repeats, "alpha": chosen.pop()}
        for key in ("cpu_s", "peak_mib"):
            for role in roles:
                entry[f"{key}, {role}"] = statistics.median(turn[role][key] for turn in turns)
                if role != "scikit-learn":
                    entry[f"{key} ratio, {role}"] = statistics.median(turn["scikit-learn"][key] / turn[role][key] for turn in turns)
        record["sizes"] = [*record["sizes"], entry]  # type: ignore[misc]
        print(json.dumps(entry), file=sys.stderr)
    from common import publish  # here, so that the ways that are timed start without nnato

    publish(arguments.name, record)


if __name__ == "__main__":
    main()
