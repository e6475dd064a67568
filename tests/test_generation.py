"""Texts under edits, against generation by forward hooks without a cache."""

from __future__ import annotations

import json

import pytest
from conftest import hook_generate, make_operator, put

from nnato.errors import OperatorError, PositionError, TextError
from nnato.generation import generate_edited

PROMPT, STEPS = "w1 w2 w3 w4 w5", 5
CASES = {"new": slice(5, None), "all": slice(1, None), "2,6": [2, 6]}


@pytest.fixture
def endless(any_model):
    """Generation does not stop at the end of a sequence, so that texts are as long as those of the reference."""
    any_model._module.generation_config.eos_token_id = None
    any_model._module.generation_config.suppress_tokens = [2]
    return any_model


@pytest.mark.parametrize("positions", list(CASES))
def test_texts_are_those_of_hooks(endless, positions):
    operators = [make_operator(0, 1), make_operator(1, 3)]
    names = ("transport", "identity", "mean")
    result = generate_edited(endless, PROMPT, operators, interventions=names, positions=positions, max_new_tokens=STEPS)
    ids = endless.tokenizer(PROMPT, return_tensors="pt").input_ids
    at = CASES[positions]
    ways = {
        "transport": [lambda seen: operators[0](seen[0]), lambda seen: operators[1](seen[1])],
        "identity": [lambda seen: seen[0], lambda seen: seen[1]],
        "mean": [operators[0].target_mean, operators[1].target_mean],
    }
    assert result.unedited.ids == hook_generate(endless._module, ids, (), STEPS)[0, ids.shape[1] :].tolist()
    for name, (first, second) in ways.items():
        edits = {1: put(at, first), 3: put(at, second)}
        want = hook_generate(endless._module, ids, edits.items(), STEPS)[0, ids.shape[1] :].tolist()
        assert result.edited[name].ids == want
        assert result.edited[name].text == endless.tokenizer.decode(want, skip_special_tokens=True)
        differs = [one != two for one, two in zip(want, result.unedited.ids, strict=True)]
        assert result.same(name) == (differs.index(True) if any(differs) else STEPS)
    assert result.edited["transport"].ids != result.unedited.ids
    json.dumps(result.to_json(), allow_nan=False)


def test_what_cannot_be_written_is_refused(model):
    operator = make_operator(0, 2)
    with pytest.raises(OperatorError, match="at least one operator"):
        generate_edited(model, PROMPT, [])
    with pytest.raises(OperatorError, match="resample needs more than one text: compare it with nnato ablate"):
        generate_edited(model, PROMPT, [operator], interventions=["resample"])
    with pytest.raises(TextError, match="the prompt is empty"):
        generate_edited(model, " ", [operator])
    with pytest.raises(PositionError, match="give new, all, or tokens"):
        generate_edited(model, PROMPT, [operator], positions="x")
    with pytest.raises(PositionError, match="position 40 lies outside: the model processes 10 tokens here"):
        generate_edited(model, PROMPT, [operator], positions="3,40", max_new_tokens=5)
    with pytest.raises(PositionError, match="0 new tokens"):
        generate_edited(model, PROMPT, [operator], max_new_tokens=0)
