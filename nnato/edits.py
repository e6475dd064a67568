"""Edits: which replacement of a residual, at which positions. An edit is data; `perplexity` carries it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nnato.errors import PositionError
from nnato.operators import TransportOperator, baselines, constant

INTERVENTIONS = {
    "transport": "the operator's prediction from the source residual",
    "identity": "the source residual as it is",
    "identity_shift": "the source residual moved by the difference of means",
    "mean": "the mean residual of training tokens at the target",
    "zero": "zero",
    "null_input": "the operator's prediction for a zero residual (the paper's ablation)",
}
"""What each intervention puts in the place of the target residual."""

DEFAULT_INTERVENTIONS = ("transport", "identity", "mean", "zero", "null_input")


def intervention(name: str, operator: TransportOperator) -> TransportOperator:
    """The map of the source residual that an intervention puts in the place of the target residual.

    Args:
        name: One of `INTERVENTIONS`.
        operator: The fitted operator of the pair.
    """
    if name == "transport":
        return operator
    if name == "zero":
        return constant(operator.pair, torch.zeros_like(operator.target_mean), name)
    if name == "null_input":
        return constant(operator.pair, operator.bias, name)
    return baselines(operator.pair, operator.source_mean, operator.target_mean)[name]


@dataclass(frozen=True)
class Positions:
    """Which positions of a sequence to edit; only ordinary tokens (no special, first or sink ones) that have a successor.

    Attributes:
        count: So many at random, drawn per sequence from the seed; None if explicit.
        explicit: These (counted from 0, at the first token of the block); empty means all eligible ones.
    """

    count: int | None = None
    explicit: tuple[int, ...] = ()

    @staticmethod
    def parse(value: int | str | Positions) -> Positions:
        """Read `5` (five at random), `"10,50,70"` (these; one alone is `"10,"`) or `"all"`.

        Raises:
            PositionError: None of these.
        """
        if isinstance(value, Positions):
            return value
        text = str(value).strip()
        if text == "all":
            return Positions()
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if parts and all(part.isascii() and part.isdigit() for part in parts):
            numbers = tuple(sorted({int(part) for part in parts}))
            if "," in text:
                return Positions(explicit=numbers)
            if numbers[0] > 0:
                return Positions(count=numbers[0])
        raise PositionError(f"positions {value!r}: give a number to draw (5), a list (10,50,70 or 10,), or all")

    def check(self, context: int) -> None:
        """Refuse what no sequence of so many tokens can satisfy.

        Raises:
            PositionError: More positions than tokens, one outside, or the first.
        """
        last = context - 2  # the last token has no successor to predict
        if self.count is not None and self.count > last:
            raise PositionError(f"{self.count} positions were asked for, but of {context} tokens at most {last} can be edited")
        if self.explicit and self.explicit[0] == 0:
            raise PositionError("position 0 cannot be edited: the first token of a sequence is never an ordinary one")
        if self.explicit and self.explicit[-1] > last:
            raise PositionError(f"position {self.explicit[-1]} lies outside: sequences of {context} tokens can be edited up to {last}")

    def order(self, context: int, seed: int, sequence: int) -> list[int]:
        """Positions of one sequence in the order in which they are taken; the same for the same seed and sequence number.

        Args:
            context: Tokens of the sequence.
            seed: Of the draw.
            sequence: Number of the sequence, part of the draw.
        """
        eligible = range(context - 1)  # the last token has no successor to predict
        if self.count is not None:
            return [int(position) for position in np.random.default_rng([seed, sequence]).permutation(eligible)]
        return [position for position in self.explicit if position in eligible] if self.explicit else list(eligible)

    def describe(self) -> str:
        """In words, for titles."""
        if self.count is not None:
            return f"{self.count} random positions"
        return f"positions {', '.join(map(str, self.explicit))}" if self.explicit else "all ordinary positions"

    def __str__(self) -> str:
        if self.count is not None:
            return str(self.count)
        return ",".join(map(str, self.explicit)) + ("," if len(self.explicit) == 1 else "") if self.explicit else "all"


def pick(order: Sequence[int], count: int | None, ordinary: Sequence[bool], sequence: int) -> list[int]:
    """The positions to edit: the first so many of an order that are ordinary tokens, sorted.

    Args:
        order: As `Positions.order` gives it.
        count: How many; None for all that are ordinary.
        ordinary: For each position, whether its token is ordinary.
        sequence: Number of the sequence, for messages.

    Raises:
        PositionError: There are too few.
    """
    eligible = [position for position in order if ordinary[position]]
    if len(eligible) < (count or 1):
        raise PositionError(f"sequence {sequence} has {len(eligible)} ordinary tokens to edit at the given positions, not {count or 1}")
    return sorted(eligible[:count])
