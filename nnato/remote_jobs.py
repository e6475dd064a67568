"""Batches of a text run by jobs on a server: tokens go there, sums come back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nnato.corpus import TokenBlocks
from nnato.errors import MomentsError, RemoteError, first_line
from nnato.nnsight_setup import save
from nnato.reduction import Sums, TokenClasses, collect, located
from nnato.remote import Server, in_words, labelled, run_job
from nnato.sites import ResidualSite
from nnato.statistics import NonFinite

if TYPE_CHECKING:
    from nnato.nnsight_setup import TransformersModel


@dataclass
class RemoteJobs(ABC):
    """Adds batches to a statistic by jobs on a server; which statistic, a subclass says.

    Attributes:
        server: Where.
        per_job: Batches in one job, at most. A job never crosses a fold, so a fold that one job can hold has the bits of a local run.
        dtype: Of the residuals on the server, once a job has told.

    Raises:
        MomentsError: `per_job` is less than 1.
    """

    server: Server
    per_job: int
    dtype: str = field(default="", init=False)

    def __post_init__(self) -> None:
        if self.per_job < 1:
            raise MomentsError(f"{self.per_job} batches in a job: at least 1 is needed")

    @property
    @abstractmethod
    def sites(self) -> tuple[ResidualSite, ...]:
        """Where residuals are read."""

    @abstractmethod
    def sizes(self) -> tuple[float, float]:
        """Bytes that travel there with each job beside the tokens, and that come back from it, both at most."""

    @abstractmethod
    def empty(self, split: str) -> Sums:
        """What a job of a split adds up."""

    @abstractmethod
    def read(self, split: str, answer: dict[str, Any]) -> Any:
        """The sums of an answer, checked; KeyError, TypeError, … say that they are not there.

        Raises:
            MomentsError: They are not what was asked for.
        """

    @abstractmethod
    def keep(self, split: str, fold: int, sums: Any) -> None:
        """Add what `read` returned to the statistic."""

    def announce(self, blocks: TokenBlocks, plan: Sequence[np.ndarray]) -> None:
        """Say what will travel, before anything does."""
        jobs, cursor = 0, 0
        while cursor < len(plan):
            jobs, cursor = jobs + 1, self._end(blocks, plan, cursor)
        tokens = int(blocks.index[:, 1].sum())
        there, back = self.sizes()
        # An id and a document number of 8 bytes, a mask and a class of one; compressed on the way.
        self.server.say(
            f"{tokens:,} tokens in {jobs} jobs: at most {in_words(18 * tokens + there * jobs)} to send in all, "
            f"{in_words(back)} back from each job"
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
        sites, medians, empty = self.sites, classes.medians, self.empty(split)

        def send(backend: Any) -> None:
            with torch.no_grad(), model.session(backend=backend):
                sums = save(collect(model, label, sent, sites, medians, empty))  # noqa: F841

        answer = labelled(run_job(self.server, model, send).get("sums"), label)
        if "not_finite" in answer:
            number, site, block, position, value = answer["not_finite"]
            raise located(NonFinite(block, position, sites[site], value), model, batches[number])
        try:
            found = self.read(split, answer)
            medians = answer["medians"].to(torch.float64).reshape(len(sites))
            counts = {reason: int(answer["counts"][reason]) for reason in ("special", "first_position", "sink")}
            sinks = {int(token): int(count) for token, count in answer["sinks"].items()}
            self.dtype = str(answer["dtype"])
        except (MomentsError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise RemoteError(f"the answer does not hold what was asked for ({first_line(error)}); nothing was added") from None
        self.keep(split, fold, found)
        classes.medians = medians
        classes.excluded.update(counts)
        classes.sinks.update(sinks)
        return end
