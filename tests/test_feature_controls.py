"""Controls of a selection: rates that match, and averages with bootstrap intervals."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats
from test_dictionaries import load_dictionary_of
from test_efficiency import rows_of

from nnato.accumulation import tokenize
from nnato.errors import DictionaryError
from nnato.feature_controls import RESAMPLES, firing_rates, matched_on_rate, selection_bias, to_json
from nnato.feature_pass import feature_pass
from nnato.features import FeatureResult, fitted_maps, score_directions
from nnato.operators import identity
from nnato.selection import Method
from nnato.sites import ResidualSite
from nnato.verdicts import Thresholds, judge, relative

PAIR = ResidualSite(1), ResidualSite(3)


def test_matched_latents_are_active_as_often():
    rng = np.random.default_rng(0)
    rate = torch.from_numpy(np.exp(rng.normal(-6, 1.5, 3000)).clip(0, 1))
    rate[::10] = 0
    chosen = torch.argsort(rate, descending=True)[torch.from_numpy(rng.choice(1200, 150, replace=False))]
    got = matched_on_rate(rate, chosen)
    assert len(set(got.tolist())) == 150
    assert not set(got.tolist()) & set(chosen.tolist())
    assert float(rate[got].min()) > 0
    assert stats.ks_2samp(rate[got], rate[chosen], method="asymp").pvalue > 0.9
    others = np.setdiff1d(np.arange(3000), chosen)
    assert stats.ks_2samp(rate[others], rate[chosen]).pvalue < 1e-6  # without matching they are not alike
    assert np.abs(np.log((rate[got] / rate[chosen]).numpy())).mean() < 0.1
    assert matched_on_rate(rate, chosen).equal(got)
    assert not matched_on_rate(rate, chosen, seed=1).equal(got)
    with pytest.raises(DictionaryError, match="only 1 others"):
        matched_on_rate(torch.tensor([0.1, 0.2, 0.3, 0.0]), torch.tensor([0, 1]))


def test_rates_are_those_of_the_pass(model, corpus, tmp_path):
    dictionary = load_dictionary_of("topk", tmp_path)
    blocks = tokenize(model, corpus)
    got = firing_rates(model, blocks, dictionary, PAIR[1])
    zeros = torch.zeros(16, dtype=torch.float64)
    seen = feature_pass(model, blocks, dictionary, [identity(PAIR, zeros, zeros)])
    torch.testing.assert_close(got, seen.rate, atol=1e-12, rtol=0)


@pytest.fixture
def result():
    """200 directions of a noisy linear system, judged."""
    rows, _ = rows_of(np.random.default_rng(0), (120, 60, 80), folds=5)
    directions = torch.nn.functional.normalize(torch.randn(230, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=1)
    maps = fitted_maps(PAIR, rows, Method())
    scores, subspace = score_directions(directions, rows, maps)
    mine, random = scores.take(torch.arange(200)), scores.take(torch.arange(200, 230))
    r2 = mine.r2["transport"]
    verdicts = judge(r2, mine.ceiling, mine.over_null, mine.r2["identity_shift"])
    shares = relative(r2, mine.ceiling)
    return FeatureResult(maps["transport"], maps["shuffled"], torch.arange(200), mine, random, subspace, Thresholds(), verdicts, shares)


def test_some_features_only_are_judged_among_themselves(result):
    places = torch.tensor([5, 190, 3, 77])
    some = result.only(places)
    assert some.features.equal(places)
    r2, ceiling = some.scores.r2["transport"], some.scores.ceiling
    assert r2.value.equal(result.scores.r2["transport"].value[places])
    want = judge(r2, ceiling, some.scores.over_null, some.scores.r2["identity_shift"])
    assert some.verdicts.code.equal(want.code)
    assert some.verdicts.q_transported.equal(want.q_transported)
    torch.testing.assert_close(some.relative.value, result.relative.value[places], equal_nan=True)


def test_the_bias_of_a_selection_is_a_paired_difference(result):
    order = result.scores.r2["transport"].value.argsort(descending=True)
    best, others = result.only(order[:50]), result.only(order[50:100])
    bias = selection_bias(best, others)
    a, b = (one.scores.r2["transport"].value.numpy() for one in (best, others))
    assert bias["selected"]["mean"].value == pytest.approx(a.mean())
    assert bias["matched"]["median"].value == pytest.approx(np.median(b))
    assert bias["random_directions"]["mean"].value == pytest.approx(float(result.random.r2["transport"].value.mean()))
    assert bias["difference"]["mean"].value == pytest.approx((a - b).mean())
    assert bias["difference"]["median"].value == pytest.approx(np.median(a) - np.median(b))
    rng = np.random.default_rng(0)
    found = [(a[some] - b[some]).mean() for some in rng.integers(0, 50, (RESAMPLES, 50))]
    assert bias["difference"]["mean"].low == pytest.approx(np.quantile(found, 0.025))
    assert bias["difference"]["mean"].low > 0
    scipys = stats.bootstrap((a,), np.mean, method="percentile", random_state=1).confidence_interval
    assert bias["selected"]["mean"].high == pytest.approx(scipys.high, rel=0.01)
    assert to_json(bias)["matched"]["mean"] == bias["matched"]["mean"].to_json()


def test_what_is_unknown_is_left_out(result):
    value = result.scores.r2["transport"].value.clone()
    value[3] = float("nan")
    holed = dataclasses.replace(
        result,
        scores=dataclasses.replace(result.scores, r2={"transport": dataclasses.replace(result.scores.r2["transport"], value=value)}),
    )
    bias = selection_bias(holed, result)
    assert bias["selected"]["mean"].value == pytest.approx(float(value.nanmean()))
    assert bias["difference"]["mean"].value == 0
    value[:] = float("nan")
    assert np.isnan(selection_bias(holed, result)["difference"]["mean"].value)
