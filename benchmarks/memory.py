"""Resident memory of `accumulate` after 1,000 and 10,000 batches: it must not grow with tokens. Its files over their announced size.

One process on a small random model, real code path throughout (temporary token file, trace, moments, checkpoints). Prints one JSON
object and writes benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from common import publish
from conftest import make_module, make_tokenizer, random_words

from nnato.accumulation import accumulate
from nnato.corpus import Corpus
from nnato.models import wrap
from nnato.transport_moments import TransportMoments


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=10_000)
    parser.add_argument("--context", type=int, default=32)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.jsonl"
        rng = np.random.default_rng(0)
        with open(text, "w") as file:
            for _ in range(arguments.batches * 10 // 9 * 4):
                file.write(json.dumps({"text": random_words(rng, arguments.context - 1)}) + "\n")
        torch.set_num_threads(1)  # a tiny model gains nothing from more, and crawls when other processes compete
        model = wrap(make_module("gemma2"), make_tokenizer())
        process, resident = psutil.Process(), {}

        def progress(stage: str, done: int, total: int | None) -> None:
            if stage == "forward passes" and done in (arguments.batches // 10, arguments.batches):
                gc.collect()
                resident[done] = process.memory_info().rss

        corpus, folder = Corpus(str(text), context=arguments.context), Path(scratch) / "m"
        found = accumulate(model, corpus, [(0, 2), (1, 3)], out=folder, batch_size=4, checkpoint_every=500, progress=progress)
        files = sum(file.stat().st_size for file in folder.iterdir())
        announced, _ = TransportMoments.bytes_for(found.moments.pairs, found.moments.d_model, corpus.folds)
    few, many = sorted(resident)
    record = {
        "batches": [few, many],
        "tokens_per_batch": 4 * arguments.context,
        "resident_mb": [resident[few] / 1e6, resident[many] / 1e6],
        "bytes_of_files": files,
        "bytes_announced": announced,
        "growth_mb": (resident[many] - resident[few]) / 1e6,
    }
    publish("memory", record)


if __name__ == "__main__":
    main()
