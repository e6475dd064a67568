"""Which positions of a sequence to edit, as data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nnato.errors import PositionError

TOKEN_CLASSES = ("word", "number", "punctuation", "space")
"""Classes of tokens by their text: with a letter, with a digit but no letter, nothing but white space, and the rest."""

PRESETS: dict[str, tuple[str, ...]] = {
    "single_js": ("10,", "50,", "100,"),
    "multiple_js": ("10,50,70,100,120", "11,51,71,101,121", "12,52,72,102,122"),
    "all_js": ("all",),
}
"""The paper's sets of positions; results are averaged over the sets (METHODS §2.2 I). Unlike there, only ordinary tokens are edited."""

USAGE = (
    "give a number to draw (5), a list (10,50,70 or 10,), all, last, every:8, a class of tokens ({classes}, all or so many: number:2), "
    "active>1.5 (tokens at which a feature is), or one of {presets}"
).format(classes=", ".join(TOKEN_CLASSES), presets=", ".join(PRESETS))


@dataclass(frozen=True)
class Positions:
    """Which positions of a sequence to edit; only ordinary tokens (no special, first or sink ones) that have a successor.

    Attributes:
        count: So many at random, drawn per sequence from the seed; None for all that the other attributes allow.
        explicit: These (counted from 0, at the first token of the block); empty means all eligible ones.
        last: Only the last eligible one.
        every: Only multiples of this number.
        tokens: Only tokens of this class of `TOKEN_CLASSES`.
        above: Only tokens at which the target residual along some feature direction exceeds this.
    """

    count: int | None = None
    explicit: tuple[int, ...] = ()
    last: bool = False
    every: int | None = None
    tokens: str | None = None
    above: float | None = None

    @staticmethod
    def parse(value: int | str | Positions) -> Positions:
        """Read one rule.

        It is `5` (five at random), `"10,50,70"` (these; one alone is `"10,"`), `"all"`, `"last"`, `"every:8"`, `"number"` or
        `"number:2"` (of a class of tokens all, or two at random), `"active>1.5"` or `"active>1.5:2"`.

        Raises:
            PositionError: None of these.
        """
        if isinstance(value, Positions):
            return value
        text = str(value).strip()
        if text in ("all", "last"):
            return Positions(last=text == "last")
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if parts and all(_is_number(part) for part in parts):
            numbers = tuple(sorted({int(part) for part in parts}))
            if "," in text:
                return Positions(explicit=numbers)
            if numbers[0] > 0:
                return Positions(count=numbers[0])
        head, colon, tail = text.partition(":")
        if (_is_number(tail) and int(tail) > 0) or not colon:
            count = int(tail) if colon else None
            if head == "every" and count:
                return Positions(every=count)
            if head in TOKEN_CLASSES:
                return Positions(count, tokens=head)
            if head.startswith("active>") and (threshold := _finite(head.removeprefix("active>"))) is not None:
                return Positions(count, above=threshold)
        raise PositionError(f"positions {value!r}: {USAGE}")

    @property
    def limit(self) -> int | None:
        """How many are taken of those that are eligible; None for all."""
        return 1 if self.last else self.count

    @property
    def may_be_absent(self) -> bool:
        """Whether a sequence without such a position is simply left as it is, and counted."""
        return self.tokens is not None or self.above is not None

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
        outside = max((*self.explicit, self.every or 0))
        if outside > last:
            raise PositionError(f"position {outside} lies outside: sequences of {context} tokens can be edited up to {last}")

    def order(self, context: int, seed: int, sequence: int, classes: Sequence[str] = ()) -> list[int]:
        """Positions of one sequence in the order in which they are taken; the same for the same seed and sequence number.

        Args:
            context: Tokens of the sequence.
            seed: Of the draw.
            sequence: Number of the sequence, part of the draw.
            classes: Of each token, as `token_class` gives them, if `tokens` asks for them.
        """
        eligible = range(context - 1)  # the last token has no successor to predict
        if self.explicit:
            return [position for position in self.explicit if position in eligible]
        if self.every is not None:
            return list(eligible[self.every :: self.every])
        if self.last:
            return list(reversed(eligible))
        order = list(eligible)
        if self.count is not None:
            order = [int(position) for position in np.random.default_rng([seed, sequence]).permutation(eligible)]
        return order if self.tokens is None else [position for position in order if classes[position] == self.tokens]

    def describe(self) -> str:
        """In words, for titles."""
        if self.explicit:
            return f"positions {', '.join(map(str, self.explicit))}"
        if self.last:
            return "the last ordinary position"
        if self.every is not None:
            return f"every multiple of {self.every}"
        what = f"{self.tokens} " if self.tokens else ""
        where = f" with a feature above {self.above:g}" if self.above is not None else ""
        return (f"all {what or 'ordinary '}positions" if self.count is None else f"{self.count} random {what}positions") + where

    def __str__(self) -> str:
        if self.explicit:
            return ",".join(map(str, self.explicit)) + ("," if len(self.explicit) == 1 else "")
        if self.every is not None:
            return f"every:{self.every}"
        head = self.tokens or ("" if self.above is None else f"active>{self.above!r}")
        if not head:
            return "last" if self.last else "all" if self.count is None else str(self.count)
        return head if self.count is None else f"{head}:{self.count}"


@dataclass(frozen=True)
class Draws:
    """The sets of positions edited in every sequence, one after the other; results are averaged over them.

    Attributes:
        rule: As it was asked for.
        sets: Rule and seed of each set.
    """

    rule: str
    sets: tuple[tuple[Positions, int], ...]

    @staticmethod
    def parse(value: int | str | Positions, seed: int = 0, seeds: int = 1) -> Draws:
        """Read a rule or a preset.

        Args:
            value: As `Positions.parse` takes it, or a name of `PRESETS`.
            seed: Of the first draw of random positions.
            seeds: How many draws of random positions, with seeds `seed`, `seed + 1`, ….

        Raises:
            PositionError: Not a rule; or several draws of what is not drawn.
        """
        if seeds < 1:
            raise PositionError(f"{seeds} seeds: give at least 1")
        if isinstance(value, str) and value.strip() in PRESETS:
            rule = value.strip()
            rules = tuple(Positions.parse(text) for text in PRESETS[rule])
        else:
            rules = (Positions.parse(value),)
            rule = str(rules[0])
        if seeds > 1 and rules[0].count is None:
            raise PositionError(f"positions {rule!r} are not drawn, so {seeds} seeds would give the same: draw some (5), or give one seed")
        return Draws(rule, tuple((one, seed + number) for number in range(seeds) for one in rules))

    @property
    def first(self) -> Positions:
        """The rule of the first set."""
        return self.sets[0][0]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds that were used, in order."""
        return tuple(dict.fromkeys(seed for _, seed in self.sets))

    def check(self, context: int) -> None:
        """As `Positions.check`, of every set.

        Raises:
            PositionError: No sequence of so many tokens has such positions.
        """
        for rule, _ in self.sets:
            rule.check(context)

    def describe(self) -> str:
        """In words, for titles."""
        words = f"{self.rule} ({len(self.sets)} sets)" if len(self.sets) > len(self.seeds) else self.first.describe()
        return words if len(self.seeds) == 1 else f"{words}, {len(self.seeds)} seeds"


def token_class(text: str) -> str:
    """The class of a token by its decoded text: one of `TOKEN_CLASSES`."""
    if not text.strip():
        return "space"
    if any(character.isalpha() for character in text):
        return "word"
    return "number" if any(character.isdigit() for character in text) else "punctuation"


def pick(order: Sequence[int], count: int | None, ordinary: Sequence[bool], sequence: int, may_be_absent: bool = False) -> list[int]:
    """The positions to edit: the first so many of an order that are ordinary tokens, sorted.

    Args:
        order: As `Positions.order` gives it.
        count: How many; None for all that are ordinary.
        ordinary: For each position, whether its token is ordinary.
        sequence: Number of the sequence, for messages.
        may_be_absent: Give none if there are too few.

    Raises:
        PositionError: There are too few.
    """
    eligible = [position for position in order if ordinary[position]]
    if len(eligible) < (count or 1):
        if may_be_absent:
            return []
        raise PositionError(f"sequence {sequence} has {len(eligible)} ordinary tokens to edit at the given positions, not {count or 1}")
    return sorted(eligible[:count])


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _finite(text: str) -> float | None:
    """A finite number, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
