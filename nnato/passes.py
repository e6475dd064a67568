"""Positions of tokens in forward passes: which of them one pass of a sequence processes. Plain classes, which travel to a server."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

from nnato.errors import PositionError

Positions = int | slice | Sequence[int] | torch.Tensor | None


class Passes:
    """Where in a sequence an edit is: which pass, and how long the prompt was.

    Attributes:
        number: Of the pass, from 0.
        prompt: Tokens of the first pass; None before it.
        expected: Most tokens that are generated; None if nobody knows.
    """

    number = 0
    prompt: int | None = None
    expected: int | None = 1

    def locate(self, positions: Positions, length: int) -> tuple[Any, list[bool]]:
        """Find positions of the sequence among the last `length` tokens of it, which this pass processes.

        Returns:
            An index of the second dimension of the pass, empty if none is there; and of each position, whether it is there.

        Raises:
            PositionError: They name nothing, or a token that is not there or never will be.
        """
        if self.prompt is None:
            self.prompt = length
        if positions is None:
            return slice(None), []
        end = self.prompt + self.number
        limit = self.prompt - 1 + (self.expected or 1)
        chosen = _chosen(positions, self.prompt, limit, max(limit, end))
        if not chosen and self.expected is not None:
            raise PositionError(f"positions {positions} name none of the {limit} tokens")
        here = [end - length <= position < end for position in chosen]
        return [position - end + length for position, found in zip(chosen, here, strict=True) if found], here


def _chosen(positions: Any, prompt: int, limit: int, end: int) -> list[int]:
    """Checked positions, counted from the start of a sequence; negative ones count from the end of the prompt, slices go up to `end`."""
    if isinstance(positions, torch.Tensor):
        if positions.dtype == torch.bool or positions.dim() > 1:
            raise PositionError(f"positions of dtype {positions.dtype} and shape {tuple(positions.shape)}: give indices, not a mask")
        positions = positions.tolist()
    if isinstance(positions, slice):
        start, stop = [bound if bound is None or bound >= 0 else max(0, bound + prompt) for bound in (positions.start, positions.stop)]
        return list(range(end)[start : stop : positions.step])
    chosen = [operator.index(positions)] if hasattr(positions, "__index__") else [operator.index(position) for position in positions]
    for position in chosen:
        if not -prompt <= position < limit:
            raise PositionError(f"position {position} lies outside the sequence of {limit} tokens")
    return [position + prompt if position < 0 else position for position in chosen]
