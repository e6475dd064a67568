"""Moments accumulated by jobs on a server: tokens go there, sums come back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nnato.corpus import TokenBlocks
from nnato.errors import MomentsError, RemoteError, first_line
from nnato.moments import Moments, unpack
from nnato.nnsight_setup import save
from nnato.reduction import TokenClasses, collect, located
from nnato.remote import Server, in_words, labelled, run_job
from nnato.statistics import NonFinite
from nnato.transport_moments import TransportMoments

if TYPE_CHECKING:
    from nnato.nnsight_setup import TransformersModel


@dataclass
class RemoteMoments:
    """Adds batches to moments by jobs on a server.

    Attributes:
        server: Where.
        moments: What is added to.
        per_job: Batches in one job, at most. A job never crosses a fold, so a fold that one job can hold has the bits of a local run.
        keep_excluded: Whether sums of special tokens, first positions and sinks are fetched too.
        dtype: Of the residuals on the server, once a job has told.
    """

    server: Server
    moments: TransportMoments
    per_job: int
    keep_excluded: bool
    dtype: str = ""

    def announce(self, blocks: TokenBlocks, plan: Sequence[np.ndarray]) -> None:
        """Say what will travel, before anything does."""
        jobs, cursor = 0, 0
        while cursor < len(plan):
            jobs, cursor = jobs + 1, self._end(blocks, plan, cursor)
        tokens = int(blocks.index[:, 1].sum())
        pairs, own = len(self.moments.pairs), len(self.moments.sites)
        answer = 8 * self.moments.d_model**2 * ((1 + self.keep_excluded) * (pairs + own / 2) + pairs * self.moments.null)
        # An id and a document number of 8 bytes, a mask and a class of one; compressed on the way.
        self.server.say(
            f"{tokens:,} tokens in {jobs} jobs: at most {in_words(18 * tokens)} to send in all, {in_words(answer)} back from each job"
        )

    def about(self) -> dict[str, Any]:
        """Where the sums come from, in JSON."""
        return {"host": self.server.host, "dtype": self.dtype, "per_job": self.per_job}

    def _end(self, blocks: TokenBlocks, plan: Sequence[np.ndarray], cursor: int) -> int:
        """Number of the batch behind the job that begins with a batch."""
        folds = [tuple(blocks.index[rows[0], [2, 5]]) for rows in plan[cursor : cursor + self.per_job]]
        return cursor + next((number for number, fold in enumerate(folds) if fold != folds[0]), len(folds))

    def add(self, model: TransformersModel, blocks: TokenBlocks, plan: Sequence[np.ndarray], cursor: int, classes: TokenClasses) -> int:
        """Run one job from a batch on.

        Args:
            model: The model, with or without weights.
            blocks: The text.
            plan: Row numbers of each batch.
            cursor: Number of the first batch.
            classes: Medians and counts; updated.

        Returns:
            The number of the next batch.

        Raises:
            RemoteError: The job failed, or its answer does not fit; nothing was added.
            ActivationError: A residual is not finite; nothing was added.
        """
        end = self._end(blocks, plan, cursor)
        batches = [blocks.batch(rows) for rows in plan[cursor:end]]
        split, fold = batches[0].split, batches[0].fold
        label = f"{blocks.fingerprint['digest']} {cursor}-{end}"
        sent = [(batch.ids, batch.mask, batch.special, batch.documents) for batch in batches]
        pairs, width, medians, keep_excluded = self.moments.pairs, self.moments.d_model, classes.medians, self.keep_excluded
        keep_shuffled = split == "train" and self.moments.null

        def send(backend: Any) -> None:
            with torch.no_grad(), model.session(backend=backend):
                sums = save(collect(model, label, sent, pairs, width, medians, keep_excluded, keep_shuffled))  # noqa: F841

        answer = labelled(run_job(self.server, model, send).get("sums"), label)
        if "not_finite" in answer:
            number, site, block, position, value = answer["not_finite"]
            raise located(NonFinite(block, position, self.moments.sites[site], value), model, batches[number])
        try:
            ordinary = unpack(answer["ordinary"], Moments.of_pairs(pairs, width))
            excluded = unpack(answer["excluded"], Moments.of_pairs(pairs, width)) if keep_excluded else None
            shuffled = unpack(answer["shuffled"], Moments(pairs, width)) if keep_shuffled else None
            medians = answer["medians"].to(torch.float64).reshape(len(self.moments.sites))
            counts = {reason: int(answer["counts"][reason]) for reason in ("special", "first_position", "sink")}
            sinks = {int(token): int(count) for token, count in answer["sinks"].items()}
            self.dtype = str(answer["dtype"])
        except (MomentsError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise RemoteError(f"the answer does not hold what was asked for ({first_line(error)}); nothing was added") from None
        self.moments.add(split, fold, ordinary, excluded, shuffled)
        classes.medians = medians
        classes.excluded.update(counts)
        classes.sinks.update(sinks)
        return end
