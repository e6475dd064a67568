"""What sharing a text out costs: CPU time of shards and a merge, of a Ray cluster, and of one that loses a worker, over one process.

The embedded model and text, one pair of sites, the real commands in processes of their own, start and loading of weights included. Ways
take turns. CPU time is that of all processes that a command starts, by the system's accounting, read ten times a second. Ends with an
error if any two ways differ by more than 1e-12 of a matrix' largest value. Prints one JSON object and writes it to
benchmarks/results/cluster.json.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import psutil
from common import publish
from test_shards import everything

from nnato.accumulation import load_moments
from nnato.ray_engine import SHARDS_PER_WORKER

TOLERANCE = 1e-12
WORKERS = 2
SHARDS = 2
"""Of the way without a cluster, which starts a process for each."""


def watched(arguments: list[str], kill_when: Path | None = None) -> float:
    """Run `nnato` with these arguments; the CPU seconds of its processes.

    Args:
        arguments: Of the command.
        kill_when: As soon as this folder is there, a worker of the cluster is killed, once.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from nnato.cli import main; main()", *arguments]
    seconds: dict[tuple[int, float], float] = {}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as started:
        root = psutil.Process(started.pid)
        while started.poll() is None:
            workers = []
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in [root, *root.children(recursive=True)]:
                    with contextlib.suppress(psutil.NoSuchProcess):  # it has ended since
                        used = process.cpu_times()
                        seconds[process.pid, process.create_time()] = used.user + used.system
                        workers += [process.pid] * (process.cmdline()[:1] == ["ray::Worker.run"])
            if kill_when is not None and workers and kill_when.exists():
                os.kill(workers[0], signal.SIGKILL)
                kill_when = None
            time.sleep(0.1)
        said = started.stderr.read() if started.stderr else ""
    if started.returncode or kill_when is not None:
        raise SystemExit(f"{' '.join(command)} ended with {started.returncode}, or before a worker could be killed:\n{said}")
    return sum(seconds.values())


def run(way: str, job: list[str], out: Path) -> float:
    """CPU seconds of one way to come from a text to moments."""
    if way == "one process":
        return watched([*job, "--out", str(out)])
    if way == "shards and a merge":
        parts = [out.with_name(f"{out.name}-{number}") for number in range(1, SHARDS + 1)]
        used = [watched([*job, "--shard", f"{number}/{SHARDS}", "--out", str(part)]) for number, part in enumerate(parts, 1)]
        used.append(watched(["merge", *map(str, parts), "--out", str(out)]))
        for part in parts:
            shutil.rmtree(part)
        return sum(used)
    cluster = [*job, "--engine", "ray", "--workers", str(WORKERS), "--out", str(out)]
    return watched(cluster, out / "shards" / f"2-of-{SHARDS_PER_WORKER * WORKERS}" if way == "Ray, a worker killed" else None)


WAYS = ("one process", "shards and a merge", "Ray", "Ray, a worker killed")


def difference(one: Path, other: Path) -> float:
    """The largest difference of any means or products of two folders, relative to the largest value of the same kind."""
    found = 0.0
    for mine, yours in zip(*(everything(load_moments(folder).moments) for folder in (one, other)), strict=True):
        if mine.n != yours.n:
            raise SystemExit(f"{other} holds {yours.n} tokens where {one} holds {mine.n}")
        for a, b in ((mine.mean, yours.mean), (mine.scatter, yours.scatter)):
            found = max(found, float((a - b).abs().max()) / float(a.abs().max()))
    return found


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8_000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    job = ["accumulate", "--pairs", "9:12", "--tokens", str(arguments.tokens), "--quiet"]
    turns, largest = [], 0.0
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(arguments.repeats):
            places = {way: Path(scratch) / f"{turn}-{way.replace(' ', '-').replace(',', '')}" for way in WAYS}
            turns.append({way: run(way, job, place) for way, place in places.items()})
            largest = max([largest, *(difference(places[WAYS[0]], places[way]) for way in WAYS[1:])])
            for place in places.values():
                shutil.rmtree(place)
    if largest > TOLERANCE:
        raise SystemExit(f"the moments of two ways differ by {largest}")
    record = {
        "pairs": "9:12",
        "tokens": arguments.tokens,
        "workers": WORKERS,
        "shards": SHARDS,
        "repeats": arguments.repeats,
        "cpu_s": {way: statistics.median(turn[way] for turn in turns) for way in WAYS},
        "ratio": {way: statistics.median(turn[way] / turn[WAYS[0]] for turn in turns) for way in WAYS[1:]},
        "ratio_range": {way: [f(turn[way] / turn[WAYS[0]] for turn in turns) for f in (min, max)] for way in WAYS[1:]},
        "largest_difference": largest,
    }
    publish("cluster", record)


if __name__ == "__main__":
    main()
