"""One JSON, one table and one figure of all benchmark results, and what became worse since the committed ones.

    python benchmarks/summary.py                 # writes results/summary.json and docs/images/benchmarks.png, prints the table
    python benchmarks/summary.py --compare HEAD  # also compares with the results in a commit; ends with 1 if a ratio lost more than 20 %

Only ratios within one run are compared: seconds depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
FIGURE = Path(__file__).parent.parent / "docs" / "images" / "benchmarks.png"
LOSS = 1.2
"""A ratio that is worse by this factor is a regression."""


@dataclass(frozen=True)
class Row:
    """One ratio.

    Attributes:
        what: What is compared.
        value: The ratio.
        target: What it should not exceed, or reach; None for rivals and descriptions.
        lower: Whether less is better; None if the ratio is of a rival.
    """

    what: str
    value: float
    target: float | None
    lower: bool | None

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached."""
        if self.target is None:
            return None
        return self.value <= self.target if self.lower else self.value >= self.target

    def worse_than(self, before: Row) -> bool:
        """Whether it lost more than 20 % since."""
        if self.lower is None:
            return False
        return (self.value / before.value if self.lower else before.value / self.value) > LOSS


def accumulation(record: dict[str, Any]) -> Iterator[Row]:
    """Of benchmarks/accumulation.py."""
    bare = "CPU time over the bare forward pass"
    for name, found in record["one_pair"].items():
        ours = name == "nnato"
        yield Row(f"one pair, {name}: {bare}", found["ratio"], 1.05 if ours else None, True if ours else None)
    for name, found in record["all_pairs"].items():
        last = name.startswith("nnato, float32 products, without null")
        yield Row(f"all pairs of {record['model']}, {name}: {bare}", found["ratio"], 1.7 if last else None, True)
    for name, found in record["sums_of_one_pair"].items():
        ours = name.startswith("nnato")
        yield Row(f"sums of one pair, {name}: CPU time over nnato", found["ratio"], None, True if ours else None)
    for name, found in record["gram"].items():
        yield Row(f"Gram products, {name}: share of the BLAS peak", found["share_of_peak"], 0.8, False)
    seconds = record["processes_cpu_s"]
    for name, most in (("import nnato", 0.1), ("nnato --help", 0.3)):
        yield Row(f"{name}: CPU seconds over bare Python", seconds[name] - seconds["python"], most, True)


def memory(record: dict[str, Any]) -> Iterator[Row]:
    """Of benchmarks/memory.py."""
    few, many = record["resident_mb"]
    yield Row(f"resident memory after {record['batches'][1]:,} batches over {record['batches'][0]:,}", many / few, 1.02, True)
    if "bytes_of_files" in record:  # results of older commits are compared with, too
        yield Row("files of sums at width 32: bytes over those announced", record["bytes_of_files"] / record["bytes_announced"], 1.2, True)


def trace(record: dict[str, Any]) -> Iterator[Row]:
    """Of benchmarks/trace.py."""
    for shape in record["shapes"]:
        yield Row(f"ATOTrace, {shape['tokens']} tokens: CPU time over forward hooks", shape["ratio"], 1.05, True)


def solvers(record: dict[str, Any]) -> Iterator[Row]:
    """Of benchmarks/solvers.py."""
    for size in record["sizes"]:
        for key, value in size.items():
            measure, _, role = key.partition(" ratio, ")
            if role:
                ours = role.startswith("moments")
                words = {"cpu_s": "CPU time", "peak_mib": "peak memory"}[measure]
                what = f"penalty search, {size['d_model']} x {size['tokens']:,}, {role}: {words} of scikit-learn over it"
                yield Row(what, value, None, False if ours else None)


def ablation(record: dict[str, Any]) -> Iterator[Row]:
    """Of benchmarks/ablation.py."""
    for one in record["by_target"]:
        yield Row(f"ablation of {record['model']}, target {one['target']}: CPU time of full passes over ablate", one["ratio"], None, False)


def features(record: dict[str, Any]) -> Iterator[Row]:
    """Of benchmarks/features.py."""
    yield Row("R² of all features, loop over features: CPU time over that from moments", record["ratio"], 50, False)
    for name, value in record["pass"].items():
        if name.startswith("ratio"):
            sampled = name.endswith("up to the target, one token in 32")
            yield Row(f"pass over 16,384 features and 8 operators: {name}", value[0], 1.5 if sampled else None, True)


def remote(record: dict[str, Any]) -> Iterator[Row]:
    """Of benchmarks/remote.py."""
    for kept in (False, True):
        few, many = (run["received"] for run in record["runs"] if run["excluded_kept"] == kept)
        what = "with" if kept else "without"
        yield Row(f"bytes from a server for three times the tokens, {what} excluded tokens", many / few, 1.02, True)


def cluster(record: dict[str, Any]) -> Iterator[Row]:
    """Of benchmarks/cluster.py."""
    for way, ratio in record["ratio"].items():
        yield Row(f"{record['tokens']:,} tokens by {way}: CPU time over one process", ratio, None, True)


def mlsae(record: dict[str, Any]) -> Iterator[Row]:
    """Of benchmarks/mlsae.py."""
    layers, training = record["layer_statistics"], record["training"]
    yield Row("layer statistics: CPU time of the dense way over sums from codes", layers["cpu_ratio"], 5, False)
    yield Row("layer statistics: memory of the dense way over sums from codes", layers["memory_ratio"], 100, False)
    yield Row("layer statistics: resident memory after 1M tokens over 100k", record["memory"]["ratio"], 1.02, True)
    yield Row("training on a stream, less its forward passes: speed over sae_lens on stored rows", training["speed"], 0.9, False)
    errors = training["fvu_held_out"]
    yield Row("training: variance left out over that of the authors' recipe", errors["nnato"] / errors["authors"], 1, True)
    yield Row("training: the same, with our learning rate in theirs", errors["nnato"] / errors["authors, at our rate"], None, True)


SOURCES: dict[str, Callable[[dict[str, Any]], Iterator[Row]]] = {
    "accumulation": accumulation,
    "memory": memory,
    "trace": trace,
    "solvers": solvers,
    "solvers-rivals": solvers,
    "features": features,
    "remote": remote,
    "cluster": cluster,
    "mlsae": mlsae,
    "ablation": ablation,
    "ablation-smollm2": ablation,
}


def rows(read: Callable[[str], str | None]) -> dict[str, Row]:
    """All ratios, by name, of the results that there are."""
    texts = {name: read(f"{name}.json") for name in SOURCES}
    return {row.what: row for name, text in texts.items() if text is not None for row in SOURCES[name](json.loads(text))}


def here(name: str) -> str | None:
    """A result in the working tree."""
    return (RESULTS / name).read_text() if (RESULTS / name).exists() else None


def committed(commit: str) -> Callable[[str], str | None]:
    """Reads results of a commit."""

    def read(name: str) -> str | None:
        command = ["git", "show", f"{commit}:./results/{name}"]
        shown = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True)
        return shown.stdout if shown.returncode == 0 else None

    return read


def show(now: dict[str, Row], before: dict[str, Row]) -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("ratio", "value", "target", *(["before"] if before else []))
    for what, row in now.items():
        wanted = "" if row.target is None else f"{'≤' if row.lower else '≥'} {row.target:g}{'' if row.reached else '  missed'}"
        old = [f"{before[what].value:.3f}{'  WORSE' if row.worse_than(before[what]) else ''}" if what in before else "-"] if before else []
        table.add_row(what, f"{row.value:.3f}", wanted, *old)
    Console().print(table)


def draw(now: dict[str, Row]) -> None:
    """The figure: every ratio of CPU time over the bare forward pass."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    ending = ": CPU time over the bare forward pass"
    shown = {what.removesuffix(ending): row for what, row in now.items() if what.endswith(ending)}
    figure, axes = plt.subplots(figsize=(7.2, 0.36 * len(shown) + 1), layout="constrained")
    colours = ["#8d99ae" if row.lower is None else "#2a6f97" for row in shown.values()]
    bars = axes.barh(list(shown), [row.value for row in shown.values()], color=colours)
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    for number, row in enumerate(shown.values()):
        if row.target is not None:
            axes.plot([row.target] * 2, [number - 0.45, number + 0.45], color="#bb3e03", linewidth=1.5)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("CPU time over the bare forward pass\n(black: 1; red: target)", fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(FIGURE, dpi=110)


def main() -> None:
    """Write, print, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", metavar="COMMIT", help="compare with the results in this commit")
    arguments = parser.parse_args()
    now = rows(here)
    before = rows(committed(arguments.compare)) if arguments.compare else {}
    (RESULTS / "summary.json").write_text(json.dumps([asdict(row) for row in now.values()], indent=1) + "\n")
    draw(now)
    show(now, before)
    if worse := [what for what, row in now.items() if what in before and row.worse_than(before[what])]:
        sys.exit(f"{len(worse)} ratios are worse by more than 20 %: " + "; ".join(worse))


if __name__ == "__main__":
    main()
