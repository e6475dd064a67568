"""Edits and losses: against forward hooks, position by position, and calibrated intervals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import BLOCKS, WIDTH, hook_residuals, make_module

from nnato import losses, perplexity
from nnato.edits import INTERVENTIONS, Positions, intervention, pick
from nnato.errors import ActivationError, OperatorError, PositionError, SiteError, TextError
from nnato.models import describe, wrap
from nnato.operators import TransportOperator
from nnato.perplexity import Bootstrap, ablate
from nnato.sites import ResidualSite


def make_operator(source, target, seed=0, details=None):
    generator = torch.Generator().manual_seed(seed)
    weight, x, y = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((WIDTH, WIDTH), (WIDTH,), (WIDTH,)))
    return TransportOperator(ResidualSite(source), ResidualSite(target), weight / 4, x, y, details=details or {})


def reference(model, ids, operator, edited, name):
    """Losses, and KL of the next-token distributions, under an edit by forward hooks, in float64."""
    x_mean, y_mean = operator.source_mean, operator.target_mean

    def edit(value, seen):
        x = seen[operator.source.key][0].double()
        replacement = {
            "transport": lambda: x @ operator.weight + (y_mean - x_mean @ operator.weight),
            "identity": lambda: x,
            "identity_shift": lambda: x + y_mean - x_mean,
            "mean": lambda: y_mean.expand_as(x),
            "zero": lambda: torch.zeros_like(x),
            "null_input": lambda: (y_mean - x_mean @ operator.weight).expand_as(x),
        }[name]()
        value = value.clone()
        value[0, edited] = replacement[edited].float()
        return value

    results = []
    for edits in ({}, {int(operator.target): edit}):
        _, logits = hook_residuals(model._module, ids, edits.items())
        logp = torch.log_softmax(logits[0, :-1].double(), -1)
        results.append((logp, -logp[torch.arange(len(logp)), ids[0, 1:]]))
    (clean_logp, clean), (edit_logp, edit_loss) = results
    kl = (clean_logp.exp() * (clean_logp - edit_logp)).sum(-1)
    return clean, edit_loss, kl


@pytest.mark.parametrize("pair", [(0, 2), (-1, 1), (1, BLOCKS - 1)])
def test_effects_equal_a_hook_based_reference(any_model, corpus, pair):
    operator = make_operator(*pair)
    result = ablate(any_model, [operator], corpus, positions=3, interventions=tuple(INTERVENTIONS), sequences=6, seed=4)[0]
    blocks = corpus.tokenize(any_model.tokenizer)
    rows = blocks.full_blocks("test", 6)
    losses = []
    want = {name: [] for name in INTERVENTIONS}
    for row, edited in zip(rows, result.edited, strict=True):
        ids = blocks.batch([row]).ids
        for name in INTERVENTIONS:
            clean, edit, kl = reference(any_model, ids, operator, edited, name)
            assert torch.equal(edit[: edited[0]], clean[: edited[0]])  # nothing changes before the first edit
            delta = edit - clean
            want[name].append((delta[edited[0] :].mean(), delta[edited].mean(), kl[edited[0] :].mean(), delta.mean()))
        losses.append(clean.mean())
    assert result.log_perplexity == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)
    for name, effect in result.effects.items():
        expected = np.array(want[name])
        np.testing.assert_allclose(effect.per_sequence, expected[:, :3], atol=2e-5)
        assert effect.delta_loss.value == pytest.approx(expected[:, 0].mean(), abs=2e-5)
        assert effect.delta_loss_at_edit.value == pytest.approx(expected[:, 1].mean(), abs=2e-5)
        assert effect.kl == pytest.approx(expected[:, 2].mean(), abs=2e-5)
        assert effect.log_perplexity == pytest.approx(result.log_perplexity + expected[:, 3].mean(), abs=2e-5)
        mean = np.array(want["mean"])[:, 0].mean()
        if not np.isnan(effect.loss_recovered_mean):
            assert effect.loss_recovered_mean == pytest.approx((mean - expected[:, 0].mean()) / mean, abs=1e-3)


def test_few_rows_per_pass_make_no_difference(model, corpus, monkeypatch):
    operator = make_operator(0, 2)
    whole = ablate(model, [operator], corpus, sequences=3, positions=4)[0]
    monkeypatch.setattr(losses, "LOGIT_BYTES", 1)
    single = ablate(model, [operator], corpus, sequences=3, positions=4)[0]
    for name in whole.effects:
        np.testing.assert_allclose(single.effects[name].per_sequence, whole.effects[name].per_sequence, atol=1e-5)


def test_positions_are_the_same_for_every_pair_and_follow_the_seed(model, corpus):
    operators = [make_operator(0, 2), make_operator(1, 3)]
    first, second = ablate(model, operators, corpus, sequences=4)
    assert first.edited == second.edited
    assert all(len(edited) == 5 and edited[0] > 0 and edited[-1] < 31 for edited in first.edited)
    assert len(set(map(tuple, first.edited))) == 4
    again = ablate(model, operators[:1], corpus, sequences=4)[0]
    assert again.to_json() == first.to_json()
    assert ablate(model, operators[:1], corpus, sequences=4, seed=1)[0].edited != first.edited


def test_tokens_that_are_sinks_anywhere_in_the_fit_are_not_edited(model, corpus):
    """Site 3 takes part in no edit, but its sinks were left out of the fit."""
    norms = []
    blocks = corpus.tokenize(model.tokenizer)
    rows = blocks.full_blocks("test", 4)
    for row in rows:
        seen, _ = hook_residuals(model._module, blocks.batch([row]).ids)
        norms.append(seen[3][0].norm(dim=-1))
    ordered = torch.stack(norms)[:, 1:].flatten().sort().values
    limit = float(ordered[len(ordered) // 2 :][:2].mean())  # between two tokens, so that rounding does not decide
    details = {"medians": {"0": 1e6, "2": 1e6, "3": limit / 10}}
    result = ablate(model, [make_operator(0, 2, details=details)], corpus, positions="all", sequences=4)[0]
    for edited, norm in zip(result.edited, norms, strict=True):
        assert edited == [p for p in range(1, 31) if norm[p] <= limit]
    explicit = ablate(model, [make_operator(0, 2, details=details)], corpus, positions="3,4,5,6,7,8,9", sequences=4)[0]
    assert explicit.skipped == 4 * 7 - sum(map(len, explicit.edited)) > 0
    assert result.skipped == 0


def test_sinks_are_not_edited(model, corpus):
    medians = {"0": 1e-6, "2": 1e6}  # every token is a sink at site 0
    with pytest.raises(PositionError, match="sequence 0 has 0 ordinary tokens to edit at the given positions, not 5"):
        ablate(model, [make_operator(0, 2, details={"medians": medians})], corpus, sequences=2)


def test_a_perfect_operator_loses_nothing(model, corpus):
    """Block 2 is made the identity, so that the identity operator 1:2 predicts exactly what the model computes."""
    module = make_module("gemma2")
    with torch.no_grad():
        module.model.layers[2].post_attention_layernorm.weight.fill_(-1)  # Gemma scales by 1 + weight
        module.model.layers[2].post_feedforward_layernorm.weight.fill_(-1)
    eye, zero = torch.eye(WIDTH, dtype=torch.float64), torch.zeros(WIDTH, dtype=torch.float64)
    far = zero + 30  # ȳ + (x - x̄) W is x all the same
    operator = TransportOperator(ResidualSite(1), ResidualSite(2), eye, zero, zero + 0.1)
    exact = TransportOperator(ResidualSite(1), ResidualSite(2), eye, far, far)
    result = ablate(wrap(module, model.tokenizer), [exact], corpus, positions="all", interventions=["transport", "mean"], sequences=8)[0]
    assert abs(result.effects["transport"].delta_loss.value) < 1e-6
    assert result.effects["transport"].kl < 1e-5
    shifted = ablate(wrap(module, model.tokenizer), [operator], corpus, interventions=["transport"], sequences=4)[0]
    assert shifted.effects["transport"].kl > 1e-6


def test_summaries_of_known_effects():
    """Six sequences of three documents; columns: diluted Δ, Δ from the first edit, Δ at the edits, KL."""
    names = ("transport", "mean", "zero")
    changes = np.zeros((6, 3, 4))
    base = np.array([0.9, 1.1, 1.0, 1.0, 1.2, 0.8])
    for number, scale in enumerate((0.25, 1.0, 3.0)):
        changes[:, number] = np.stack([0.1 * scale * base, scale * base, 2 * scale * base, scale * base / 2], axis=1)
    documents = np.array([5, 5, 6, 6, 7, 7])
    effects = perplexity.effects_of(names, changes, 2.5, documents, 0)
    assert effects["transport"].loss_recovered_mean == pytest.approx(0.75)
    assert effects["zero"].loss_recovered_mean == pytest.approx(-2)
    assert effects["mean"].loss_recovered_mean == pytest.approx(0)
    assert effects["zero"].log_perplexity == pytest.approx(2.5 + 0.3)
    assert effects["zero"].minus_transport.value == pytest.approx(2.75)
    assert effects["transport"].minus_transport is None
    assert effects["zero"].kl == pytest.approx(1.5)
    assert effects["zero"].sign_test == pytest.approx(0.25)  # three documents, all worse: 2 · (1/2)³
    changes[:, 1, 1] = [1, 1, -1, -1, 0, 0]
    effects = perplexity.effects_of(names, changes, 2.5, documents, 0)
    assert np.isnan(effects["transport"].loss_recovered_mean)
    assert effects["mean"].to_json()["loss_recovered_mean"] is None


def test_interventions_are_maps(model):
    operator = make_operator(0, 2)
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(intervention("null_input", operator)(x), operator(torch.zeros_like(x)))
    assert not bool(intervention("zero", operator)(x).any())
    assert intervention("transport", operator) is operator


# ---- positions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (5, Positions(count=5)),
        ("5", Positions(count=5)),
        ("7, 3", Positions(explicit=(3, 7))),
        ("9,", Positions(explicit=(9,))),
        ("all", Positions()),
    ],
)
def test_positions_parse_and_print(text, want):
    assert Positions.parse(text) == want
    assert Positions.parse(str(want)) == want
    assert Positions.parse(want) is want


@pytest.mark.parametrize("text", ["0", "-1", "x", "", "1.5", "3,x", ","])
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
        return pick(positions.order(6, 0, sequence), positions.count, ordinary, sequence)

    assert choose(Positions(), 0) == [1, 3, 4]  # the last token has no successor
    assert choose(Positions(explicit=(2, 3)), 0) == [3]
    with pytest.raises(PositionError, match="sequence 7 has 0 ordinary tokens to edit at the given positions, not 1"):
        choose(Positions(explicit=(2,)), 7)
    drawn = {tuple(choose(Positions(count=2), sequence)) for sequence in range(50)}
    assert drawn == {(1, 3), (1, 4), (3, 4)}
    assert "3 random" in Positions(count=3).describe()
    assert Positions(explicit=(2, 3)).describe() == "positions 2, 3"
    assert Positions().describe() == "all ordinary positions"


# ---- refusals ----------------------------------------------------------------------------------------------------------


def test_bad_requests_are_refused_before_work(model, corpus):
    operator = make_operator(0, 2)
    with pytest.raises(OperatorError, match="unknown intervention 'noise'; known are transport, identity"):
        ablate(model, [operator], corpus, interventions=["noise"])
    with pytest.raises(OperatorError, match="at least one intervention"):
        ablate(model, [operator], corpus, interventions=[])
    with pytest.raises(OperatorError, match="at least one operator"):
        ablate(model, [], corpus)
    with pytest.raises(PositionError, match="position 0 cannot be edited"):
        ablate(model, [operator], corpus, positions="0,3")
    with pytest.raises(PositionError, match="40 positions were asked for"):
        ablate(model, [operator], corpus, positions=40)
    with pytest.raises(TextError, match="1 sequences: an interval needs at least 2"):
        ablate(model, [operator], corpus, sequences=1)
    with pytest.raises(TextError, match="1000 sequences of 32 tokens were asked for"):
        ablate(model, [operator], corpus, sequences=1000)
    with pytest.raises(SiteError, match="site 9 does not exist"):
        ablate(model, [make_operator(0, 9)], corpus)


def test_sequences_of_a_single_document_are_refused(model, corpus, tmp_path):
    blocks = corpus.tokenize(model.tokenizer)
    blocks.index[:, 3] = 7
    with pytest.raises(TextError, match="all 3 test sequences come from one document"):
        ablate(model, [make_operator(0, 2)], blocks, sequences=3)


def test_operators_of_other_models_are_refused(model, corpus, tokenizer):
    fitted_on = describe(model).fingerprint()
    operator = make_operator(0, 2, details={"model": fitted_on})
    ablate(model, [operator], corpus, sequences=2)
    with pytest.raises(OperatorError, match=r"was fitted on Gemma2ForCausalLM \(float32\), not on Gemma2ForCausalLM"):
        ablate(wrap(make_module("gemma2", seed=1), tokenizer), [operator], corpus)
    narrow = TransportOperator(
        ResidualSite(0),
        ResidualSite(1),
        torch.eye(3, dtype=torch.float64),
        torch.zeros(3, dtype=torch.float64),
        torch.zeros(3, dtype=torch.float64),
    )
    with pytest.raises(OperatorError, match="maps width 3 to 3, but Gemma2ForCausalLM has width 16"):
        ablate(model, [narrow], corpus)


def test_losses_that_are_not_finite_stop_the_run(model, corpus):
    operator = make_operator(0, 2)
    bad = TransportOperator(*operator.pair, operator.weight * float("inf"), operator.source_mean, operator.target_mean)
    with pytest.raises(ActivationError, match="transport at 0:2 gives a loss that is not finite in sequence 0"):
        ablate(model, [bad], corpus, interventions=["transport"], sequences=2)


# ---- intervals ---------------------------------------------------------------------------------------------------------


def test_intervals_cover_what_they_should():
    """400 simulations, 40 documents of 1 to 4 sequences that share a document effect; 95 % nominal, tolerance 91 to 98 %."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(400):
        documents = np.repeat(np.arange(40), rng.integers(1, 5, 40))
        values = 1 + rng.normal(size=40)[documents] + rng.normal(size=len(documents))
        interval = Bootstrap(documents, trial).interval(values)
        covered += interval.low <= 1 <= interval.high
    assert 0.91 <= covered / 400 <= 0.98


def test_intervals_of_a_constant_are_a_point():
    interval = Bootstrap(np.arange(10), 0).interval(np.full(10, 3.0))
    assert (interval.value, interval.low, interval.high) == pytest.approx((3, 3, 3))
