"""Intervals from folds of documents: against numpy, and by their coverage in simulations (METHODS §9, acceptance 25)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from nnato.intervals import Interval, Spread, jackknife, ratio_spread, share_explained


def test_ratio_spread_is_the_cluster_formula():
    rng = np.random.default_rng(0)
    errors, totals = rng.random(12) + 1, rng.random(12) + 2
    spread = ratio_spread(torch.from_numpy(errors), torch.from_numpy(totals))
    ratio = errors.sum() / totals.sum()
    assert spread.variance == pytest.approx(12 / 11 * ((errors - ratio * totals) ** 2).sum() / totals.sum() ** 2)
    assert spread.degrees == 11
    got = share_explained(torch.from_numpy(errors), torch.from_numpy(totals))
    half = stats.t.ppf(0.975, 11) * math.sqrt(spread.variance)
    assert (got.value, got.low, got.high) == pytest.approx((1 - ratio, 1 - ratio - half, 1 - ratio + half))


def test_equal_denominators_give_the_interval_of_a_mean():
    values = np.random.default_rng(1).normal(size=9) ** 2
    got = share_explained(torch.from_numpy(values), torch.ones(9, dtype=torch.float64))
    low, high = stats.t.interval(0.95, 8, loc=1 - values.mean(), scale=stats.sem(values))
    assert (got.low, got.high) == pytest.approx((low, high))


def test_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(2).normal(size=11)
    left_out = [float(np.delete(values, one).mean()) for one in range(11)]
    assert math.sqrt(jackknife(left_out).variance) == pytest.approx(stats.sem(values))


def test_sums_have_satterthwaites_degrees():
    total = Spread(4.0, 9) + Spread(1.0, 4)
    assert total.variance == 5.0
    assert total.degrees == pytest.approx(25 / (16 / 9 + 1 / 4))
    assert (Spread(2.0, 9) + Spread(0.0, 4)).degrees == pytest.approx(9)
    assert (Spread(0.0, 9) + Spread(0.0, 4)).degrees == 4
    assert Spread(2.0, 5).scaled(3.0) == Spread(18.0, 5)


def test_one_fold_has_no_interval():
    alone = share_explained(torch.ones(1, dtype=torch.float64), torch.full((1,), 2.0, dtype=torch.float64))
    assert alone.value == 0.5
    assert math.isnan(alone.low)
    assert math.isnan(alone.high)
    assert jackknife([1.0]) is None
    assert jackknife([1.0, math.nan]) is None
    assert set(Interval(1.0).to_json()) == {"value", "low", "high"}


def test_intervals_cover_on_autocorrelated_documents():
    """Coverage of nominal 95 % for the R² of a fixed map: 400 data sets of 120 documents of 64 AR(0.8) tokens, in 10 folds."""
    rng = np.random.default_rng(3)
    documents, length, covered, repeats = 120, 64, 0, 400
    true = 1 - 0.25 / 1.25  # y = x + e, var x = 1, var e = 1/4, predicted by x

    def series():
        noise = rng.normal(size=(documents, length))
        noise[:, 1:] *= math.sqrt(1 - 0.8**2)
        for step in range(1, length):
            noise[:, step] += 0.8 * noise[:, step - 1]
        return noise

    for _ in range(repeats):
        x, e = series(), 0.5 * series()
        y = x + e
        errors = (e**2).sum(1).reshape(10, -1).sum(1)
        totals = ((y - y.mean()) ** 2).sum(1).reshape(10, -1).sum(1)
        got = share_explained(torch.from_numpy(errors), torch.from_numpy(totals))
        covered += got.low <= true <= got.high
    assert 0.92 <= covered / repeats <= 0.975
