"""Rules that say which positions to edit."""

from __future__ import annotations

import pytest

from nnato.errors import PositionError
from nnato.positions import PRESETS, Draws, Positions, pick, token_class


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (5, Positions(count=5)),
        ("5", Positions(count=5)),
        ("7, 3", Positions(explicit=(3, 7))),
        ("9,", Positions(explicit=(9,))),
        ("all", Positions()),
        ("last", Positions(last=True)),
        ("every:8", Positions(every=8)),
        ("number", Positions(tokens="number")),
        ("word:3", Positions(3, tokens="word")),
        ("active>-1.5", Positions(above=-1.5)),
        ("active>1e-07:2", Positions(2, above=1e-7)),
    ],
)
def test_positions_parse_and_print(text, want):
    assert Positions.parse(text) == want
    assert Positions.parse(str(want)) == want
    assert Positions.parse(want) is want


@pytest.mark.parametrize(
    "text", ["0", "-1", "x", "", "1.5", "3,x", ",", "every", "every:0", "number:x", "number:0", "active>x", "active>inf", "all:3", "word:"]
)
def test_bad_positions_are_refused(text):
    with pytest.raises(PositionError, match="give a number to draw"):
        Positions.parse(text)


def test_positions_that_no_sequence_has_are_refused():
    Positions(count=30).check(32)
    with pytest.raises(PositionError, match="31 positions were asked for, but of 32 tokens at most 30 can be edited"):
        Positions(count=31).check(32)
    with pytest.raises(PositionError, match="position 31 lies outside"):
        Positions(explicit=(3, 31)).check(32)


def test_positions_keep_to_ordinary_tokens():
    ordinary = [False, True, False, True, True, True]

    def choose(positions, sequence):
        return pick(positions.order(6, 0, sequence), positions.limit, ordinary, sequence)

    assert choose(Positions(), 0) == [1, 3, 4]  # the last token has no successor
    assert choose(Positions(explicit=(2, 3)), 0) == [3]
    with pytest.raises(PositionError, match="sequence 7 has 0 ordinary tokens to edit at the given positions, not 1"):
        choose(Positions(explicit=(2,)), 7)
    drawn = {tuple(choose(Positions(count=2), sequence)) for sequence in range(50)}
    assert drawn == {(1, 3), (1, 4), (3, 4)}
    assert "3 random" in Positions(count=3).describe()
    assert Positions(explicit=(2, 3)).describe() == "positions 2, 3"
    assert Positions().describe() == "all ordinary positions"
    assert choose(Positions(last=True), 0) == [4]
    assert choose(Positions(every=3), 0) == [3]
    assert pick([2], None, ordinary, 0, may_be_absent=True) == []
    assert pick([1, 2, 3], 2, ordinary, 0, may_be_absent=True) == [1, 3]


def test_random_positions_are_those_of_the_class_in_the_same_draw():
    classes = ["word", "number"] * 20
    whole = Positions(count=5).order(40, 3, 7)
    assert sorted(whole) == list(range(39))
    assert Positions(2, tokens="number").order(40, 3, 7, classes) == [position for position in whole if position % 2]
    assert Positions(tokens="number").order(40, 3, 7, classes) == list(range(1, 39, 2))
    assert whole != Positions(count=5).order(40, 4, 7)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (" the", "word"),
        ("x2", "word"),
        ("42", "number"),
        ("½", "punctuation"),
        (" ", "space"),
        ("", "space"),
        ("\n", "space"),
        ("é", "word"),
        ("。", "punctuation"),
    ],
)
def test_token_classes(text, want):
    assert token_class(text) == want


def test_presets_are_the_papers_sets():
    assert Draws.parse("single_js").sets == tuple((Positions(explicit=(j,)), 0) for j in (10, 50, 100))
    multiple = [rule.explicit for rule, _ in Draws.parse("multiple_js").sets]
    assert multiple == [tuple(j + shift for j in (10, 50, 70, 100, 120)) for shift in range(3)]
    assert Draws.parse("all_js").first == Positions()
    for name in PRESETS:
        Draws.parse(name).check(256)
        assert Draws.parse(name).rule == name
    assert Draws.parse("multiple_js").describe() == "multiple_js (3 sets)"
    with pytest.raises(PositionError, match="position 100 lies outside"):
        Draws.parse("single_js").check(64)


def test_seeds_give_several_draws():
    draws = Draws.parse(5, seed=3, seeds=2)
    assert draws.sets == ((Positions(5), 3), (Positions(5), 4))
    assert draws.seeds == (3, 4)
    assert draws.describe() == "5 random positions, 2 seeds"
    with pytest.raises(PositionError, match="positions 'all' are not drawn, so 2 seeds would give the same"):
        Draws.parse("all", seeds=2)
    with pytest.raises(PositionError, match="0 seeds: give at least 1"):
        Draws.parse(5, seeds=0)


def test_rules_in_words():
    words = {
        "last": "the last ordinary position",
        "every:8": "every multiple of 8",
        "number:2": "2 random number positions",
        "word": "all word positions",
        "active>1.5": "all ordinary positions with a feature above 1.5",
    }
    assert {text: Positions.parse(text).describe() for text in words} == words
