"""Edits and losses: against forward hooks, position by position, and calibrated intervals."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from conftest import BLOCKS, WIDTH, hook_residuals, make_module, supply
from scipy import stats

from nnato import losses
from nnato.edits import INTERVENTIONS, EditRecord, intervention
from nnato.effects import Bootstrap, Measured, effects_of, sign_test
from nnato.errors import ActivationError, OperatorError, PositionError, SiteError, TextError
from nnato.models import describe, wrap
from nnato.operators import TransportOperator, random_rotation
from nnato.perplexity import ablate
from nnato.sites import ResidualSite


def make_operator(source, target, seed=0, details=None):
    generator = torch.Generator().manual_seed(seed)
    weight, x, y = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((WIDTH, WIDTH), (WIDTH,), (WIDTH,)))
    return TransportOperator(ResidualSite(source), ResidualSite(target), weight / 4, x, y, details=details or {})


def rotation(seed):
    """As `operators.random_rotation` draws it."""
    return random_rotation((ResidualSite(0), ResidualSite(1)), torch.zeros(WIDTH).double(), torch.zeros(WIDTH).double(), seed).weight


def hook_edit(operator, name, edited, seed, extra, donor, first=None):
    """An edit for `hook_residuals`, in float64; positions 1 to the last are ordinary."""
    x_mean, y_mean = operator.source_mean, operator.target_mean

    def affine(x, op=operator):
        return x @ op.weight + (op.target_mean - op.source_mean @ op.weight)

    def edit(value, seen):
        x, y = seen[operator.source.key][0].double(), value[0].double()
        ordinary = list(range(1, len(x)))
        others = [ordinary[(ordinary.index(p) + len(ordinary) // 2) % len(ordinary)] for p in edited]
        new = y.clone()
        if name == "moved_error":
            new[edited] = y[edited] + affine(x[others]) - y[others]
        else:
            error, turn = affine(x) - y, rotation(seed)
            projector = extra["projector"]
            by_gram = extra["D"].T @ torch.linalg.inv(extra["D"] @ extra["D"].T) @ extra["D"]
            new[edited] = {
                "transport": lambda: affine(x),
                "identity": lambda: x,
                "identity_shift": lambda: x + y_mean - x_mean,
                "mean": lambda: y_mean.expand_as(x),
                "zero": lambda: torch.zeros_like(x),
                "null_input": lambda: (y_mean - x_mean @ operator.weight).expand_as(x),
                "resample": lambda: torch.cat([donor[operator.target.key][0, 1:2], donor[operator.target.key][0, 1:]]).double(),
                "random_orthogonal": lambda: y_mean + (x - x_mean) @ turn,
                "rotated": lambda: y_mean + (affine(x) - y_mean) @ turn,
                "features": lambda: y + error @ by_gram,
                "steer": lambda: y + extra["vector"],
                "lts": lambda: y + error @ projector,
                "lts_complement": lambda: y + error @ (torch.eye(WIDTH) - projector),
                **{one: (lambda one=one: affine(x, extra[one])) for one in ("shuffled", "shrunk_to_identity", "rank_2")},
            }[name]()[edited]
        value = value.clone()
        value[0] = new.float()
        return value

    return edit


def reference(model, ids, edits):
    """Losses, log-probabilities, and KL of the next-token distributions, under edits by forward hooks, in float64."""
    results = []
    for some in ({}, edits):
        _, logits = hook_residuals(model._module, ids, some.items())
        logp = torch.log_softmax(logits[0, :-1].double(), -1)
        results.append((logp, -logp[torch.arange(len(logp)), ids[0, 1:]]))
    (clean_logp, clean), (edit_logp, edit_loss) = results
    kl = (clean_logp.exp() * (clean_logp - edit_logp)).sum(-1)
    return clean, edit_loss, kl, (clean_logp.argmax(-1) == edit_logp.argmax(-1)).double()


def other_document(blocks, rows, number):
    """The next sequence of another document, round the end."""
    documents = dict(zip(rows.tolist(), blocks.index[rows, 3].tolist(), strict=True))
    return next(row for row in [*rows[number:].tolist(), *rows.tolist()] if documents[row] != documents[rows[number]])


NAMES = (*INTERVENTIONS, "rank_2")


@pytest.mark.parametrize("pair", [(0, 2), (-1, 1), (1, BLOCKS - 1)])
def test_effects_equal_a_hook_based_reference(any_model, corpus, pair):
    operator = make_operator(*pair)
    given, extra = supply(pair)
    result = ablate(any_model, [operator], corpus, positions=3, interventions=NAMES, sequences=3, seed=4, **given)[0]
    blocks = corpus.tokenize(any_model.tokenizer)
    rows = blocks.full_blocks("test", 3)
    losses = []
    want = {name: [] for name in NAMES}
    by_distance = {name: {} for name in NAMES}
    for number, (row, edited) in enumerate(zip(rows, result.edited, strict=True)):
        ids = blocks.batch([row]).ids
        donor, _ = hook_residuals(any_model._module, blocks.batch([other_document(blocks, rows, number)]).ids)
        for name in NAMES:
            edits = {int(operator.target): hook_edit(operator, name, edited, 4, extra, donor)}
            clean, edit, kl, same = reference(any_model, ids, edits)
            assert torch.equal(edit[: edited[0]], clean[: edited[0]])  # nothing changes before the first edit
            delta = edit - clean
            after = [p for p in range(edited[0], 31) if p not in edited]
            means = [delta[edited[0] :].mean(), delta[edited].mean(), kl[edited[0] :].mean(), delta.mean()]
            want[name].append([*means, kl[edited].mean(), kl[after].mean(), same[edited[0] :].mean(), same[edited].mean()])
            for p in range(edited[0], 31):
                distance = p - max(e for e in edited if e <= p)
                found = by_distance[name].setdefault(0 if distance == 0 else 1 + int(np.log2(distance)), [])
                found.append((delta[p], kl[p], same[p]))
        losses.append(clean.mean())
    assert result.log_perplexity == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)
    for name, effect in result.effects.items():
        expected = np.array(want[name])
        np.testing.assert_allclose(effect.per_sequence, expected[:, :3], atol=2e-5)
        intervals = [effect.delta_loss, effect.delta_loss_at_edit, effect.kl_interval, effect.delta_loss_diluted, effect.kl_at_edit]
        intervals += [effect.kl_after, effect.agreement, effect.agreement_at_edit]
        np.testing.assert_allclose([one.value for one in intervals], expected.mean(0), atol=2e-5)
        assert effect.log_perplexity == pytest.approx(result.log_perplexity + expected[:, 3].mean(), abs=2e-5)
        assert [(one.first, one.last) for one in effect.by_distance][:4] == [(0, 0), (1, 1), (2, 3), (4, 7)]
        for place, one in enumerate(effect.by_distance):
            values = np.array(by_distance[name][place])
            assert one.positions == len(values)
            np.testing.assert_allclose([one.delta_loss.value, one.kl.value, one.agreement.value], values.mean(0), atol=2e-5)
        for against in ("mean", "zero", "resample"):
            base = np.array(want[against])[:, 0].mean()
            if not np.isnan(effect.loss_recovered[against].value):
                assert effect.loss_recovered[against].value == pytest.approx((base - expected[:, 0].mean()) / base, abs=1e-3)
        zero, clean_loss = np.array(want["zero"])[:, 3].mean(), result.log_perplexity
        if not np.isnan(effect.ce_loss_score.value):  # sae_lens: (ablation - edited) / (ablation - unedited), zero ablation, all tokens
            score = (clean_loss + zero - effect.log_perplexity) / (clean_loss + zero - clean_loss)
            assert effect.ce_loss_score.value == pytest.approx(score, abs=1e-3)


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


def known_effects(changes, documents, positions=1):
    """Sequences of three predictions: one edited position and one behind it. changes: Δ in each bin, (sequences, interventions, bins)."""
    sums = np.zeros((len(documents), 1, changes.shape[1], 2, 3))
    sums[:, 0, :, :, 0], sums[:, 0, :, :, 1], sums[:, 0, :, :, 2] = changes, changes / 2, 1
    record = EditRecord("x", ((0, 1),), ("00",), None, "5", (0,))
    names = ("transport", "mean", "zero")[: changes.shape[1]]
    edits = {name: dataclasses.replace(record, intervention=name) for name in names}
    return effects_of(edits, Measured(sums, np.ones((len(documents), 1, 2)), 10), 2.5, documents, 0)


def test_summaries_of_known_effects():
    """Six sequences of three documents."""
    base = np.array([0.9, 1.1, 1.0, 1.0, 1.2, 0.8])
    changes = np.stack([scale * base for scale in (0.25, 1.0, 3.0)], axis=1)[:, :, None] * np.array([2.0, 0.0])
    documents = np.array([5, 5, 6, 6, 7, 7])
    effects = known_effects(changes, documents)
    assert effects["transport"].loss_recovered_mean == pytest.approx(0.75)
    assert effects["zero"].loss_recovered_mean == pytest.approx(-2)
    assert effects["mean"].loss_recovered_mean == pytest.approx(0)
    assert effects["transport"].ce_loss_score.value == pytest.approx(1 - 0.25 / 3)
    assert effects["zero"].log_perplexity == pytest.approx(2.5 + 0.6)
    assert effects["zero"].minus_transport.value == pytest.approx(2.75)
    assert effects["zero"].at_edit_minus_transport.value == pytest.approx(5.5)
    assert effects["zero"].kl_minus_transport.value == pytest.approx(2.75 / 2)
    assert effects["transport"].minus_transport is None
    assert effects["zero"].kl == pytest.approx(1.5)
    assert effects["zero"].kl_after.value == 0
    assert effects["zero"].kl_at_edit.value == pytest.approx(3)
    assert effects["zero"].sign_test == pytest.approx(0.25)  # three documents, all worse: 2 · (1/2)³
    changes[:, 1, 0] = [1, 1, -1, -1, 0, 0]
    effects = known_effects(changes, documents)
    assert np.isnan(effects["transport"].loss_recovered_mean)
    assert effects["mean"].to_json()["loss_recovered_mean"] is None


def test_a_null_edit_gives_uniform_p_values():
    """600 simulated ablations of 101 documents in which edits do nothing but noise: P(p ≤ a) is a, up to the steps of the sign test."""
    rng = np.random.default_rng(3)
    documents = np.repeat(np.arange(101), 2)
    values = []
    for _ in range(600):
        noise = rng.standard_t(3, size=101)[documents] + rng.standard_t(3, size=len(documents))
        moved = Bootstrap(documents, 0).by_document(noise) if not values else None
        changes = np.zeros((len(documents), 1, 2))
        changes[:, 0, 0] = noise
        means = np.bincount(documents, weights=noise / 2) / 2
        if moved is not None:
            np.testing.assert_allclose(moved / 2, means)
        values.append(sign_test(means))
    for level in (0.05, 0.1, 0.25, 0.5, 0.75):
        exact = stats.binom.cdf(int(stats.binom.ppf(level / 2, 101, 0.5)) - 1, 101, 0.5) * 2
        assert abs(np.mean(np.array(values) <= level) - exact) < 4 * np.sqrt(level * (1 - level) / 600) + 0.02
    assert known_effects(changes, documents)["transport"].sign_test == pytest.approx(values[-1])


def test_interventions_are_maps(model):
    operator = make_operator(0, 2)
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(intervention("null_input", operator)[1](x), operator(torch.zeros_like(x)))
    assert not bool(intervention("zero", operator)[1](x).any())
    assert intervention("transport", operator)[1] is operator


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


def test_intervals_of_few_documents_are_those_of_student():
    """Of normal data the levels give `x̄ ± t √(s² / n)`, whose n - 1 the plain percentiles lack; resampling leaves 5 %."""
    values = np.random.default_rng(1).normal(size=6)
    interval = Bootstrap(np.arange(6), 0).interval(values)
    want = stats.t.interval(0.95, 5, loc=values.mean(), scale=stats.sem(values))
    plain = stats.bootstrap((values,), np.mean, method="percentile", random_state=0).confidence_interval
    assert interval.high - interval.low == pytest.approx(want[1] - want[0], rel=0.12)
    assert interval.high - interval.low > 1.25 * (plain.high - plain.low)
    alone = Bootstrap(np.zeros(3, dtype=int), 0).interval(np.arange(3.0))
    assert alone.value == 1
    assert np.isnan([alone.low, alone.high]).all()


def test_intervals_of_a_constant_are_a_point():
    interval = Bootstrap(np.arange(10), 0).interval(np.full(10, 3.0))
    assert (interval.value, interval.low, interval.high) == pytest.approx((3, 3, 3))
