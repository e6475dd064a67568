"""Moments added up by jobs on a server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nnato.moments import Moments, unpack
from nnato.reduction import MomentSums, Sums
from nnato.remote_jobs import RemoteJobs
from nnato.sites import ResidualSite
from nnato.transport_moments import TransportMoments


@dataclass
class RemoteMoments(RemoteJobs):
    """Adds batches to moments by jobs on a server.

    Attributes:
        moments: What is added to.
        keep_excluded: Whether sums of special tokens, first positions and sinks are fetched too.
    """

    moments: TransportMoments
    keep_excluded: bool

    @property
    def sites(self) -> tuple[ResidualSite, ...]:
        """Where residuals are read."""
        return self.moments.sites

    def sizes(self) -> tuple[float, float]:
        """Nothing travels there beside the tokens; back come the sums."""
        pairs, own = len(self.moments.pairs), len(self.moments.sites)
        return 0, 8 * self.moments.d_model**2 * ((1 + self.keep_excluded) * (pairs + own / 2) + pairs * self.moments.null)

    def empty(self, split: str) -> Sums:
        """Moments of a job; shuffled pairs are of training documents."""
        return MomentSums(self.moments.pairs, self.moments.d_model, self.keep_excluded, self._shuffled(split))

    def read(self, split: str, answer: dict[str, Any]) -> tuple[Moments, Moments | None, Moments | None]:
        """Ordinary, excluded and shuffled moments of an answer."""
        pairs, width = self.moments.pairs, self.moments.d_model
        return (
            unpack(answer["ordinary"], Moments.of_pairs(pairs, width)),
            unpack(answer["excluded"], Moments.of_pairs(pairs, width)) if self.keep_excluded else None,
            unpack(answer["shuffled"], Moments(pairs, width)) if self._shuffled(split) else None,
        )

    def keep(self, split: str, fold: int, sums: tuple[Moments, Moments | None, Moments | None]) -> None:
        """Add them."""
        self.moments.add(split, fold, *sums)

    def _shuffled(self, split: str) -> bool:
        return split == "train" and self.moments.null
