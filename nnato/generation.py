"""Text that a model writes when residuals are replaced at every step, beside what it writes without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nnato.edits import EditRecord, intervention
from nnato.errors import OperatorError, PositionError, TextError
from nnato.models import describe
from nnato.operators import TransportOperator
from nnato.perplexity import check_operator
from nnato.sites import Pair
from nnato.trace import ATOTrace, save

if TYPE_CHECKING:
    from nnato.nnsight_setup import TransformersModel

NEW = "new"
"""Positions: the prompt's last token, which predicts the first new one, and every new token."""


@dataclass(frozen=True)
class Continuation:
    """How a text goes on.

    Attributes:
        ids: The new tokens.
        text: The same in words.
        edit: What was put where; None for the unedited model.
    """

    ids: list[int]
    text: str
    edit: EditRecord | None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"ids": self.ids, "text": self.text, "edit": self.edit.to_json() if self.edit else None}


@dataclass(frozen=True)
class Generation:
    """What a prompt is continued by, unedited and under edits.

    Attributes:
        prompt: The prompt.
        pairs: (source, target) of each edit in a pass.
        unedited: Without edits.
        edited: By intervention.
    """

    prompt: str
    pairs: tuple[Pair, ...]
    unedited: Continuation
    edited: dict[str, Continuation]

    def same(self, name: str) -> int:
        """How many new tokens an edited text begins with that the unedited one has too."""
        mine, theirs = self.edited[name].ids, self.unedited.ids
        shorter = min(len(mine), len(theirs))
        return next((number for number in range(shorter) if mine[number] != theirs[number]), shorter)

    def to_json(self) -> dict[str, Any]:
        """The results of `nnato generate --json`."""
        return {
            "prompt": self.prompt,
            "pairs": [[source.key, target.key] for source, target in self.pairs],
            "unedited": self.unedited.to_json(),
            "edited": {name: {**one.to_json(), "same_tokens": self.same(name)} for name, one in self.edited.items()},
        }


def generate_edited(
    model: TransformersModel,
    prompt: str,
    operators: Sequence[TransportOperator],
    *,
    interventions: Sequence[str] = ("transport",),
    positions: str = NEW,
    max_new_tokens: int = 40,
) -> Generation:
    """Continue a prompt, always by the most likely token, without edits and with edits at every step.

    Args:
        model: The model.
        prompt: The prompt.
        operators: Operators whose targets are all edited in every pass.
        interventions: Names of `edits.INTERVENTIONS` that need only an operator, each for a text of its own.
        positions: `new` (the prompt's last token and every new one), `all` (all but the first), or tokens of the prompt and of what
            follows, for example "3,5", counted from 0.
        max_new_tokens: How long.

    Raises:
        OperatorError: An operator is of another model, or an intervention needs more than it.
        PositionError: A position is none.
        TextError: The prompt is empty.
    """
    info = describe(model)
    if not operators or not interventions:
        raise OperatorError("nothing to do: give at least one operator, and an intervention")
    for operator in operators:
        check_operator(operator, info)
    if max_new_tokens < 1:
        raise PositionError(f"{max_new_tokens} new tokens: give at least 1")
    if not prompt.strip():
        raise TextError("the prompt is empty: give some words to go on from")
    ways = {name: [intervention(name, operator) for operator in operators] for name in interventions}
    if other := [name for name, mine in ways.items() if any(way[0] != "map" for way in mine)]:
        raise OperatorError(f"{other[0]} needs more than one text: compare it with nnato ablate")
    ids = model.tokenizer(prompt, return_tensors="pt").input_ids
    at = _positions(positions, ids.shape[1] + max_new_tokens - 1)
    edited = {}
    for name, mine in ways.items():
        links = [(operator.pair, way) for operator, way in zip(operators, mine, strict=True)]
        record = EditRecord.of(name, links, positions, ())
        edited[name] = _continue(model, ids, max_new_tokens, links, at, record)
    return Generation(prompt, tuple(operator.pair for operator in operators), _continue(model, ids, max_new_tokens, [], at, None), edited)


def _positions(text: str, tokens: int) -> slice | list[int]:
    if text == NEW:
        return slice(-1, None)
    if text == "all":
        return slice(1, None)
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isascii() and part.isdigit() for part in parts):
        raise PositionError(f"positions {text!r}: give new, all, or tokens, for example 3,5")
    numbers = sorted({int(part) for part in parts})
    if numbers[-1] >= tokens:
        raise PositionError(f"position {numbers[-1]} lies outside: the model processes {tokens} tokens here")
    return numbers


def _continue(
    model: TransformersModel,
    ids: torch.Tensor,
    max_new_tokens: int,
    links: Sequence[tuple[Pair, Any]],
    positions: slice | list[int],
    record: EditRecord | None,
) -> Continuation:
    t = ATOTrace(model, input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False)
    for (source, target), way in links:
        t.transport(way[1], source, target, positions)
    with torch.no_grad(), t:
        result = save(t.result)
    new = result[0, ids.shape[1] :].tolist()
    return Continuation(new, model.tokenizer.decode(new, skip_special_tokens=True), record)
