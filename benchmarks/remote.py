"""Bytes that travel when moments are accumulated remotely, for little and for much text: what comes back must not grow with tokens.

Through `DryRunServer`, so the bytes are those of real requests and answers, on the embedded model. Prints one JSON object and writes
benchmarks/results/remote.json.
"""

from __future__ import annotations

import argparse
from typing import Any

from common import publish

from nnato.accumulation import accumulate
from nnato.corpus import Corpus
from nnato.dry_run import DryRunServer
from nnato.models import describe, load_model

PAIR = (9, 12)


class Counted(DryRunServer):
    """Keeps the size of every request and answer."""

    def __init__(self, model: str) -> None:
        super().__init__(model, say=self.count)
        self.sizes: list[tuple[int, int]] = []

    def count(self, text: str) -> None:
        """Called after each job, among other times."""
        if text.startswith("dry run"):
            self.sizes.append((self.sent, self.received))


def measure(model: Any, tokens: int, keep_excluded: bool) -> dict[str, Any]:
    """Largest request and answer, and what travelled in all."""
    with Counted(model.repo_id) as server:
        corpus = Corpus(tokens=tokens, folds=1)
        result = accumulate(model, corpus, [PAIR], server=server, per_job=10**6, keep_excluded=keep_excluded)
    sent, received = zip(*server.sizes, strict=True)
    return {
        "tokens": sum(result.tokens.values()),
        "excluded_kept": keep_excluded,
        "jobs": len(server.sizes),
        "largest_request": max(sent),
        "largest_answer": max(received),
        "sent": sum(sent),
        "received": sum(received),
    }


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs=2, default=[8_000, 24_000])
    arguments = parser.parse_args()
    model = load_model(remote=True)
    width = describe(model).d_model
    record = {
        "bound_per_pair": 3 * (width + 1) ** 2 * 8 + 10**6,
        "runs": [measure(model, tokens, keep) for keep in (False, True) for tokens in arguments.tokens],
    }
    publish("remote", record)


if __name__ == "__main__":
    main()
