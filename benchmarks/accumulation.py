"""CPU time of accumulation on the embedded model, beside the bare forward pass of the same blocks, the BLAS peak, and other ways.

One thread; all ways take turns on the same tokens, in alternating order, and the ratios are taken within a turn; medians are reported
with the smallest and the largest. Imports are timed in processes of their own. concept-erasure and deeptime take part where they are
installed. Prints one JSON object and writes benchmarks/results/accumulation.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, publish

from nnato.blocks import find_blocks
from nnato.models import load_model
from nnato.moments import Moments
from nnato.reduction import TokenClasses, capture
from nnato.sites import Pair, ResidualSite, grid
from nnato.statistics import ResidualBatch
from nnato.storage import provenance
from nnato.trace import TransformersModel, save
from nnato.transport_moments import TransportMoments

PAIR = (ResidualSite(9), ResidualSite(12))


class _StopError(Exception):
    """Ends a forward pass."""


def forward(model: TransformersModel, ids: torch.Tensor, last: int, seen: dict[int, torch.Tensor]) -> None:
    """The bare forward pass up to a block, without head; the residuals of the blocks named in `seen` are put there by hooks."""
    module = model._module
    blocks = module.get_submodule(find_blocks(module)[0])

    def read(number: int) -> Callable[..., None]:
        def hook(_: object, __: object, output: Any) -> None:
            if number in seen:
                seen[number] = output[0] if isinstance(output, tuple) else output
            if number == last:
                raise _StopError

        return hook

    handles = [blocks[number].register_forward_hook(read(number)) for number in {*seen, last}]
    try:
        module.base_model(input_ids=ids, use_cache=False)
    except _StopError:
        pass
    finally:
        for handle in handles:
            handle.remove()


class Ways:
    """Everything that is timed. Each way does the same work on every call."""

    def __init__(self, model: TransformersModel, ids: torch.Tensor, scratch: Path) -> None:
        self.model, self.ids, self.scratch = model, ids, scratch
        self.mask = torch.ones_like(ids, dtype=torch.bool)
        self.special = torch.zeros_like(self.mask)
        self.special[:, 0] = True
        self.documents = torch.arange(len(ids))
        self.blocks, self.width = find_blocks(model._module)[1:]

    def bare(self, last: int) -> Callable[[], None]:
        """Only the forward pass."""
        return lambda: forward(self.model, self.ids, last, {})

    def nnato(self, pairs: tuple[Pair, ...], products: torch.dtype = torch.float64, null: bool = True) -> Callable[[], None]:
        """A training batch as `accumulate` takes it: pass, token classes, checks, moments, shuffled pairs."""
        moments = TransportMoments(pairs, self.width, products=products, null=null)
        classes = TokenClasses()

        def run() -> None:
            residuals = capture(self.model, self.ids, moments.sites)
            ordinary = classes.ordinary(self.ids, self.mask, self.special, residuals)
            moments.update(ResidualBatch(residuals, moments.sites, ordinary, self.mask & ~ordinary, self.documents, "train", 0))

        return run

    def hooks_and_files(self) -> None:
        """Hand-written hooks that append float32 activations to files; the regression is still to come."""
        seen: dict[int, torch.Tensor] = dict.fromkeys(map(int, PAIR), torch.empty(0))
        forward(self.model, self.ids, int(PAIR[1]), seen)
        for site, value in seen.items():
            with open(self.scratch / f"{site}.bin", "wb") as file:
                file.write(value.numpy().tobytes())

    def hidden_states(self) -> None:
        """What transformers offers: all hidden states of the whole model, in memory; the regression is still to come."""
        states = self.model._module(input_ids=self.ids, use_cache=False, output_hidden_states=True, logits_to_keep=1).hidden_states
        for site in PAIR:
            states[int(site) + 1].clone()

    def plain_nnsight(self) -> None:
        """A plain nnsight trace that saves two blocks' outputs and stops; the regression is still to come."""
        model, layers = self.model, self.model.get(find_blocks(self.model._module)[0])
        with model.trace(input_ids=self.ids, use_cache=False) as tracer:
            a = save(layers[int(PAIR[0])].output)
            b = save(layers[int(PAIR[1])].output)
            tracer.stop()
        assert a.shape == b.shape


def sums(x: torch.Tensor, y: torch.Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """Ways to add up the covariances of one pair from activations that are there, (n, d) float32 each."""
    rows, moments = torch.stack([x, y]), Moments.of_pairs([PAIR], x.shape[1])
    half = Moments.of_pairs([PAIR], x.shape[1], products=torch.float32)
    yield "nnato", lambda: moments.update(rows)
    yield "nnato, float32 products", lambda: half.update(rows)
    yield "numpy, float64", lambda: [a.T @ b for a, b in _centred(x, y)]
    if importlib.util.find_spec("concept_erasure"):
        from concept_erasure import LeaceFitter

        fitter = LeaceFitter(x.shape[1], y.shape[1], dtype=torch.float64)
        wide = x.double(), y.double()
        yield "concept-erasure (xx and xy only)", lambda: fitter.update(*wide)
    if importlib.util.find_spec("deeptime"):
        from deeptime.covariance import Covariance

        covariance = Covariance(lagtime=1, compute_ctt=True)
        double = x.double().numpy(), y.double().numpy()
        yield "deeptime", lambda: covariance.partial_fit(double)


def _centred(x: torch.Tensor, y: torch.Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    a, b = (value.double().numpy() for value in (x, y))
    a, b = a - a.mean(0), b - b.mean(0)
    return [(a, a), (a, b), (b, b)]


def cpu(run: Callable[[], object]) -> float:
    """CPU seconds of one call, user and system."""
    start = time.process_time()
    run()
    return time.process_time() - start


def turns(ways: dict[str, Callable[[], object]], repeats: int) -> list[dict[str, float]]:
    """CPU seconds of all ways in each turn; one turn before is not counted."""
    for run in ways.values():
        run()
    found = []
    for repeat in range(repeats):
        order = list(ways) if repeat % 2 == 0 else list(ways)[::-1]
        found.append({name: cpu(ways[name]) for name in order})
    return found


def ratio(found: list[dict[str, float]], name: str, base: str) -> dict[str, float]:
    """Median, smallest and largest of a ratio within turns."""
    ratios = sorted(turn[name] / turn[base] for turn in found)
    return {"ratio": statistics.median(ratios), "smallest": ratios[0], "largest": ratios[-1]}


def processes(commands: dict[str, list[str]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of processes, by the operating system's accounting of children."""
    found: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            found[name].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def peaks(repeats: int) -> dict[str, float]:
    """GFLOP/s of one large matrix product, by dtype: the ceiling of everything here."""
    found = {}
    for dtype in (torch.float64, torch.float32):
        a = torch.randn(2304, 2304, dtype=dtype)
        found[str(dtype).removeprefix("torch.")] = 2 * 2304**3 / 1e9 / statistics.median(cpu(lambda a=a: a @ a) for _ in range(repeats))
    return found


@torch.no_grad()
def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--model")
    parser.add_argument("--all-pairs-only", help="measure only these ways of all pairs, separated by ;, and add them to the last result")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(arguments.model, device="cpu")
    ids = torch.randint(1000, 40_000, (arguments.sequences, arguments.context), generator=torch.Generator().manual_seed(0))
    tokens, repeats = ids.numel(), arguments.repeats
    with tempfile.TemporaryDirectory() as scratch:
        ways = Ways(model, ids, Path(scratch))
        sites = tuple(ResidualSite(number) for number in range(ways.blocks))
        pairs, last = grid(sites), ways.blocks - 1
        everything: dict[str, Callable[[], object]] = {
            "bare": ways.bare(last),
            "nnato": ways.nnato(pairs),
            "nnato, without null": ways.nnato(pairs, null=False),
            "nnato, float32 products": ways.nnato(pairs, torch.float32),
            "nnato, float32 products, without null": ways.nnato(pairs, torch.float32, null=False),
        }
        if arguments.all_pairs_only:
            chosen = ["bare", *arguments.all_pairs_only.split(";")]
            found = turns({name: everything[name] for name in chosen}, repeats)
            record = json.loads((RESULTS / "accumulation.json").read_text())
            extra = {"tokens_per_pass": tokens, "command": provenance()["command"]}
            record["all_pairs"] |= {f"{name}, {tokens:,} tokens a pass": ratio(found, name, "bare") | extra for name in chosen[1:]}
            publish("accumulation", record)
            return
        of_pair = turns(
            {
                "bare": ways.bare(int(PAIR[1])),
                "nnato": ways.nnato((PAIR,)),
                "hooks and files": ways.hooks_and_files,
                "output_hidden_states": ways.hidden_states,
                "plain nnsight": ways.plain_nnsight,
            },
            repeats,
        )
        of_all = turns(everything, repeats)
    rows = capture(model, ids, sites).flatten(1, 2)
    x, y = rows[int(PAIR[0])], rows[int(PAIR[1])]
    of_sums = turns({name: (lambda run=run: [run() for _ in range(5)]) for name, run in sums(x, y)}, repeats)
    peak = peaks(max(5, repeats))
    # The upper triangle of each site's own products, diagonal included, and all of each pair's.
    flops = tokens * ways.width * (len(sites) * (ways.width + 1) + len(pairs) * 2 * ways.width)
    gram = {}
    for dtype in (torch.float64, torch.float32):
        moments, name = Moments.of_pairs(pairs, ways.width, products=dtype), str(dtype).removeprefix("torch.")
        moments.update(rows)
        seconds = statistics.median(cpu(lambda moments=moments: moments.update(rows)) for _ in range(repeats))
        gram[name] = {"gflop_per_s": flops / seconds / 1e9, "share_of_peak": flops / seconds / 1e9 / peak[name]}
    started = processes(
        {
            "python": ["-c", "pass"],
            "import nnato": ["-c", "import nnato"],
            "nnato --help": ["-c", "from nnato.cli import main; main(['--help'])"],
        },
        max(7, repeats),
    )
    record = {
        "model": model._module.config._name_or_path,
        "tokens_per_pass": tokens,
        "repeats": repeats,
        "threads": 1,
        "one_pair": {name: ratio(of_pair, name, "bare") for name in of_pair[0] if name != "bare"},
        "all_pairs": {name: ratio(of_all, name, "bare") | {"tokens_per_pass": tokens} for name in of_all[0] if name != "bare"},
        "sums_of_one_pair": {name: ratio(of_sums, name, "nnato") for name in of_sums[0] if name != "nnato"},
        "seconds": {
            "bare forward to block 12": statistics.median(turn["bare"] for turn in of_pair),
            "bare forward of all blocks": statistics.median(turn["bare"] for turn in of_all),
            "sums of one pair": statistics.median(turn["nnato"] for turn in of_sums) / 5,
        },
        "blas_peak_gflop_per_s": peak,
        "gram": gram,
        "processes_cpu_s": started,
        "machine": {"processor": platform.processor() or platform.machine(), "system": platform.platform()},
    }
    publish("accumulation", record)


if __name__ == "__main__":
    main()
