"""What everything that streams over residuals has in common: one batch type, one protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from nnato.errors import ActivationError
from nnato.sites import ResidualSite

Progress = Callable[[str, int, int | None], None]
"""Told of progress: stage, units done, units in all (None if unknown)."""


@dataclass(frozen=True)
class ResidualBatch:
    """Residuals of one forward pass over some token blocks of one fold.

    Attributes:
        residuals: Float (sites, blocks, positions, d_model), in the model's dtype.
        sites: The sites, in that order.
        ordinary: bool (blocks, positions): real tokens that enter the statistics by default.
        excluded: bool (blocks, positions): real tokens that do not: special tokens, the first position, sinks (METHODS: token classes).
        documents: int64 (blocks,), hash of each block's document.
        split: `train`, `validation` or `test`.
        fold: Fold of the split. All batches of a fold come in a row.
        ids: int64 (blocks, positions), the tokens; None where nobody knows them.
    """

    residuals: torch.Tensor
    sites: tuple[ResidualSite, ...]
    ordinary: torch.Tensor
    excluded: torch.Tensor
    documents: torch.Tensor
    split: str
    fold: int
    ids: torch.Tensor | None = None

    def check_finite(self) -> None:
        """Refuse a batch with a NaN or an infinity at a real token.

        Raises:
            ActivationError: With the place of the first one: `block`, `position`, `site` and `value` are set.
        """
        if place := non_finite(self.residuals, self.ordinary | self.excluded):
            site, block, position, value = place
            raise NonFinite(block, position, self.sites[site], value)


def non_finite(residuals: torch.Tensor, real: torch.Tensor) -> tuple[int, int, int, float] | None:
    """Site number, block, position and value of the first NaN or infinity at a real token, if there is one.

    Args:
        residuals: Float (sites, blocks, positions, d_model).
        real: bool (blocks, positions).
    """
    bad = ~torch.isfinite(residuals) & real[None, :, :, None]
    if not bool(bad.any()):
        return None
    place = torch.nonzero(bad)[0].tolist()
    return place[0], place[1], place[2], float(residuals[tuple(place)])


class NonFinite(ActivationError):
    """The place of a value that is not finite, for whoever knows the text to say more."""

    def __init__(self, block: int, position: int, site: ResidualSite, value: float) -> None:
        super().__init__(f"block {block} of the batch, position {position}, site {site}: the residual is {value}")
        self.block, self.position, self.site, self.value = block, position, site, value


class Statistic(Protocol):
    """An additive statistic of residuals. Whoever follows this gets checkpoints and resumption from `streaming.stream`."""

    sites: tuple[ResidualSite, ...]

    def update(self, batch: ResidualBatch) -> None:
        """Add a batch; a refused batch leaves every bit of the state unchanged."""

    def state(self) -> tuple[Mapping[str, torch.Tensor], dict[str, Any]]:
        """Tensors and JSON from which `restore` makes the same statistic, bit for bit."""

    def restore(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
        """Take over a stored state.

        Raises:
            MomentsError: It does not fit.
        """
