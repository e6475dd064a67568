"""Shards: which batches of a text one of several jobs reads, so that all of them together read each batch once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nnato.errors import MomentsError


@dataclass(frozen=True)
class Shard:
    """One of `count` equal parts of a text.

    A shard is a run of batches in the plan of the whole text. The plan goes fold by fold, and within a fold by document hash, so a shard
    is a set of documents drawn by hash which lie in few folds. Whole batches are what is shared out, so a batch holds the same blocks, pads
    them alike and pairs the same documents for the shuffled null whatever the number of shards: the sums differ by the order of addition
    only.

    Attributes:
        number: From 1.
        count: Shards in all.
    """

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise MomentsError(f"shard {self}: give for example 1/4, 2/4, 3/4 and 4/4")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read `i/n`.

        Raises:
            MomentsError: It is not of that form.
        """
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip(), re.ASCII)
        if not match:
            raise MomentsError(f"shard {text!r}: give for example 1/4, 2/4, 3/4 and 4/4")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def batches(self, work: Sequence[int]) -> range:
        """The batches of this shard, at least one.

        Args:
            work: What each batch of the whole text costs, e.g. its tokens with padding.

        Raises:
            MomentsError: There are more shards than batches.
        """
        if self.count > len(work):
            raise MomentsError(f"{self.count} shards of {len(work)} batches: ask for at most {len(work)}, or give more text")
        done = np.concatenate([[0], np.cumsum(work)])
        shares = np.arange(self.count + 1)
        nearest = np.searchsorted(done, done[-1] * shares / self.count)
        nearest[-1] = len(work)
        begins = np.maximum.accumulate(nearest - shares) + shares  # at least one batch each, from the left …
        begins = np.minimum(begins, len(work) - self.count + shares)  # … and enough of them for those on the right
        return range(int(begins[self.number - 1]), int(begins[self.number]))
