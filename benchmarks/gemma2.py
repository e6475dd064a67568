"""What each figure of the paper costs on Gemma 2 2B: floating-point operations, seconds on named GPUs, memory, bytes over NDIF.

Predicted, not measured: operations are counted from the architecture, and a GPU is taken to reach the share of its peak that one CPU core
reaches here (benchmarks/results/accumulation.json). Prints the tables of docs/performance.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from nnato.sites import Pair, ResidualSite, grid
from nnato.transport_moments import TransportMoments

BLOCKS, D, INNER, HEADS, VOCABULARY, CONTEXT = 26, 2304, 9216, (2048, 1024), 256_000, 256
TOKENS, TRAIN, FOLDS = 250_000, 0.6, 5
PARTS = 2 * FOLDS + 1
BLOCK = 2 * (D * (2 * HEADS[0] + 2 * HEADS[1]) + 3 * D * INNER) + 2 * CONTEXT * HEADS[0]
"""Operations of a block for a token: weights, and attention to half of 256 positions on average."""
HEAD = 2 * D * VOCABULARY
PEAKS = {"A100": (19.5, 19.5), "H100 SXM": (67.0, 67.0), "L4": (30.3, 0.47)}
"""TFLOP/s in float32 and in float64 (tensor cores where they compute it), by the makers' data sheets."""


@dataclass(frozen=True)
class Figure:
    """One figure's pass over the text."""

    name: str
    pairs: tuple[Pair, ...]

    @property
    def sites(self) -> int:
        """Sites of the pairs."""
        return len({site for pair in self.pairs for site in pair})

    @property
    def forward(self) -> float:
        """Operations of the forward pass: up to the last site, no head."""
        return TOKENS * BLOCK * (1 + max(int(target) for _, target in self.pairs))

    @property
    def products(self) -> float:
        """Operations of the sums: triangles of the sites, pairs, and pairs of shuffled training tokens."""
        return TOKENS * D * (self.sites * D + 2 * len(self.pairs) * D * (1 + TRAIN))

    def seconds(self, gpu: str, shares: tuple[float, float]) -> tuple[float, float]:
        """On a GPU, with products in float64, and in float32."""
        single, double = (1e12 * peak for peak in PEAKS[gpu])
        forward = self.forward / (shares[0] * single)
        return forward + self.products / (shares[1] * double), forward + self.products / (shares[1] * single)

    @property
    def bytes_back(self) -> float:
        """From an NDIF server: one job a fold; shuffled pairs come with training folds only."""
        return 8 * D**2 * (PARTS * (len(self.pairs) + self.sites / 2) + FOLDS * len(self.pairs))

    @property
    def activations(self) -> float:
        """Bytes of the same residuals in bfloat16."""
        return 2.0 * TOKENS * D * self.sites


def sites(first: int, last: int) -> list[ResidualSite]:
    """Consecutive sites."""
    return [ResidualSite(number) for number in range(first, last + 1)]


def main() -> None:
    """Print the tables."""
    found = json.loads((Path(__file__).parent / "results" / "accumulation.json").read_text())
    peak, seconds = found["blas_peak_gflop_per_s"], found["seconds"]["bare forward of all blocks"]
    # gemma-3-270m: 18 blocks of width 640, four heads of 256 with one key and value head, inner width 2048.
    small = found["tokens_per_pass"] * 18 * (2 * (640 * (2 * 1024 + 2 * 256) + 3 * 640 * 2048) + 2 * CONTEXT * 1024)
    shares = small / seconds / 1e9 / peak["float32"], found["gram"]["float64"]["share_of_peak"]
    print(f"share of the float32 peak in the forward pass {shares[0]:.2f}, of the float64 peak in products {shares[1]:.2f}\n")
    ten, twenty = ResidualSite(10), ResidualSite(20)
    figures = [
        Figure("2: targets 10 and 20, k = 1 … 10", tuple((t - k, t) for t in (ten, twenty) for k in range(1, 11))),
        Figure("3: all pairs", grid(sites(0, BLOCKS - 1))),
        Figure("4: target 10, k = 1, 3, 7, 10", tuple((ResidualSite(10 - k), ten) for k in (1, 3, 7, 10))),
        Figure("5: target 10, k = 1 … 10", tuple((ResidualSite(10 - k), ten) for k in range(1, 11))),
    ]
    print(
        "| figure | forward, PFLOP | products, PFLOP | " + " | ".join(f"{gpu}, s" for gpu in PEAKS) + " | sums at once, GB | on disk, GB |"
    )
    print("|---|---|---|" + "---|" * (len(PEAKS) + 2))
    for figure in figures:
        times = [" / ".join(f"{value:,.0f}" for value in figure.seconds(gpu, shares)) for gpu in PEAKS]
        everything, at_once = TransportMoments.bytes_for(figure.pairs, D, FOLDS)
        cells = [figure.name, f"{figure.forward / 1e15:.2f}", f"{figure.products / 1e15:.2f}", *times]
        print("| " + " | ".join([*cells, f"{at_once / 1e9:.1f}", f"{everything / 1e9:.1f}"]) + " |")
    print("\n| figure | sent, MB | sums back, GB | activations in bfloat16, GB |\n|---|---|---|---|")
    for figure in figures:
        print(f"| {figure.name[0]} | {18 * TOKENS / 1e6:.1f} | {figure.bytes_back / 1e9:.1f} | {figure.activations / 1e9:.1f} |")
    # Figure 5's ablation: 100 sequences of 256; each edit resumes behind block 10; ten operators, ten null inputs, one zero, three sets.
    tokens = 100 * CONTEXT
    whole, edited = tokens * (BLOCKS * BLOCK + HEAD), 3 * 21 * tokens * ((BLOCKS - 11) * BLOCK + HEAD)
    print(f"\nablation of figure 5: {(whole + edited) / 1e15:.1f} PFLOP; from whole passes {64 * whole / 1e15:.1f}")
    for gpu, (single, _) in PEAKS.items():
        print(f"  {gpu}: {(whole + edited) / (shares[0] * single * 1e12):,.0f} s")
    for figure in figures[:2]:
        cluster(figure, shares)


def cluster(figure: Figure, shares: tuple[float, float]) -> None:
    """A figure's pairs from 10 million tokens on a cluster of A100s, four shards to a worker, files at 2 GB/s for all nodes together."""
    scale, starting, disk = 10_000_000 / TOKENS, 60.0, 2e9
    one = figure.seconds("A100", shares)[0] * scale
    part, null = 8 * D**2 * (len(figure.pairs) + figure.sites), 8 * D**2 * len(figure.pairs)
    print(f"\n{figure.name}, 10 million tokens\n")
    print("| workers | passes, s | first batch again, s | merge, TB | merge, s | in all, s | efficiency |\n|---|---|---|---|---|---|---|")
    for workers in (1, 4, 16, 64):
        shards = 4 * workers
        # Ordinary parts: one for each fold a shard touches; excluded tokens of the splits it touches, and the null of those that train.
        volume = (PARTS + shards) * part + (shards + 3) * part + (0.6 * shards + 1) * null
        again = shards / workers * figure.seconds("A100", shares)[0] * 8 * CONTEXT / TOKENS
        merge = 2 * volume / disk
        whole = starting + one / workers + again + merge
        cells = f"{workers} | {one / workers:,.0f} | {again:.1f} | {volume / 1e12:.2f} | {merge:,.0f} | {whole:,.0f}"
        print(f"| {cells} | {(starting + one) / workers / whole:.2f} |")


if __name__ == "__main__":
    main()
