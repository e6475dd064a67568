"""Layer statistics of a multi-layer SAE, added up by jobs on a server: its weights go there with each job, sums come back.

What runs there, `LayerSums` and `add_tokens`, are plain classes and functions on torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nnato.coding import SparseCoder
from nnato.errors import MomentsError
from nnato.layer_stats import LayerStats, Reconstruction
from nnato.operators import AffineMap
from nnato.reduction import Sums
from nnato.remote_jobs import RemoteJobs
from nnato.sites import ResidualSite


def add_tokens(coder: SparseCoder, shared: torch.Tensor, stats: LayerStats, errors: Reconstruction) -> None:
    """Encode and decode tokens, and add both to sums.

    Args:
        coder: The dictionary.
        shared: Residuals where it reads, float32 (layers, tokens, d_model).
        stats: Layer statistics; updated.
        errors: Reconstruction; updated.
    """
    values, latents = coder.codes(shared)
    error = coder.decode_sparse(values, latents, shared) - shared
    stats.add(values, latents)
    errors.add(shared, error, values)


class LayerSums:
    """Layer statistics and reconstruction of some batches of one fold.

    Args:
        coder: The dictionary.
        sites: The layers.
        translators: Of each layer, the map to where the dictionary reads; None where it reads residuals as they are.
    """

    def __init__(self, coder: SparseCoder, sites: Sequence[ResidualSite], translators: Sequence[AffineMap | None]) -> None:
        self.coder, self.translators = coder, translators
        self.layers = [int(site) for site in sites]
        self.stats: LayerStats | None = None
        self.errors: Reconstruction | None = None

    def add(self, residuals: torch.Tensor, ordinary: torch.Tensor, excluded: torch.Tensor, documents: torch.Tensor) -> None:
        """Add a batch's ordinary tokens."""
        device = residuals.device
        if self.stats is None or self.errors is None:  # only residuals say where the model computes
            self.coder = self.coder.plain(device)
            self.stats = LayerStats(self.layers, self.coder.latents, device)
            self.errors = Reconstruction(len(self.layers), self.coder.d_model, device)
        with torch.autocast(device.type, enabled=False):  # under which a server may run all this
            x = residuals[:, ordinary].float()
            shared = torch.stack([row if to is None else to(row) for row, to in zip(x, self.translators, strict=True)])
            add_tokens(self.coder, shared, self.stats, self.errors)

    def packed(self) -> dict[str, Any]:
        """`tokens`, and all sums by name: `stats`, `errors`."""
        if self.stats is None or self.errors is None:
            return {}
        parts = {"stats": self.stats.tensors(), "errors": self.errors.tensors()}
        sums = {name: {key: tensor.cpu() for key, tensor in part.items()} for name, part in parts.items()}
        return {**sums, "tokens": self.stats.tokens}


@dataclass
class RemoteLayers(RemoteJobs):
    """Adds batches to layer statistics by jobs on a server.

    Attributes:
        coder: The dictionary, on the CPU.
        layers: The layers.
        translators: As in `LayerSums`.
        merge: Takes a fold's number with the sums of a job.
    """

    coder: SparseCoder = field(repr=False)
    layers: tuple[ResidualSite, ...]
    translators: tuple[AffineMap | None, ...] = field(repr=False)
    merge: Callable[[int, LayerStats, Reconstruction], None] = field(repr=False)

    @property
    def sites(self) -> tuple[ResidualSite, ...]:
        """Where residuals are read."""
        return self.layers

    def sizes(self) -> tuple[float, float]:
        """The weights of dictionary and translators travel there; the sums come back."""
        weights = sum(tensor.nbytes for tensor in vars(self.coder).values() if isinstance(tensor, torch.Tensor))
        maps = sum(one.weight.nbytes + one.source_mean.nbytes + one.target_mean.nbytes for one in self.translators if one is not None)
        return weights + maps, sum(tensor.nbytes for part in self._none() for tensor in part.tensors().values())

    def empty(self, split: str) -> Sums:
        """Sums of a job."""
        return LayerSums(self.coder, self.layers, self.translators)

    def read(self, split: str, answer: dict[str, Any]) -> tuple[LayerStats, Reconstruction]:
        """The sums of an answer."""
        stats, errors = self._none()
        stats.take(answer["tokens"], answer["stats"])
        errors.take(answer["tokens"], answer["errors"])
        if int(stats.published[0]) > self.per_job or stats.tokens < float(stats.active.max()):
            raise MomentsError("the sums are of more batches or tokens than were sent")
        return stats, errors

    def keep(self, split: str, fold: int, sums: tuple[LayerStats, Reconstruction]) -> None:
        """Add them."""
        self.merge(fold, *sums)

    def _none(self) -> tuple[LayerStats, Reconstruction]:
        return LayerStats(self.layers, self.coder.latents), Reconstruction(len(self.layers), self.coder.d_model)
