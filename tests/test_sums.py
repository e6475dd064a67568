"""Scores from six sums, their errors, and adjusted p values, against numpy, scipy and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import r2_score

from nnato.errors import MomentsError
from nnato.intervals import jackknife, ratio_spread
from nnato.sums import Estimates, PairSums, benjamini_hochberg, jackknifed, quantiles, share
from nnato.verdicts import VERDICTS, Thresholds, judge, relative


@pytest.fixture(scope="module")
def folds():
    """Four folds of different sizes, three features: well predicted, badly, and constant."""
    rng = np.random.default_rng(0)
    found = []
    for size in (30, 50, 41, 22):
        a = rng.normal(size=(size, 3)) * [1, 5, 0] + [2, -3, 7]
        found.append((a, a * [0.9, 0.2, 1] + rng.normal(size=a.shape) * [0.3, 4, 1]))
    return found


def sums_of(folds, offset=0.0):
    return PairSums.stack([PairSums.of(torch.from_numpy(a - offset), torch.from_numpy(b - offset)) for a, b in folds])


@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_scores_are_those_of_the_rows(folds, offset):
    sums = sums_of(folds, offset)
    if offset:
        sums = sums.moved(torch.full((3,), offset, dtype=torch.float64))
    a, b = (np.concatenate([fold[side] for fold in folds]) for side in (0, 1))
    got = sums.r2().value
    for feature in (0, 1):
        x, y = a[:, feature], b[:, feature]
        line = stats.linregress(y, x)
        assert float(got[feature]) == pytest.approx(r2_score(x, y), abs=1e-12)
        assert float(sums.pearson()[feature]) == pytest.approx(line.rvalue, abs=1e-12)
        assert float(sums.slope()[feature]) == pytest.approx(line.slope, abs=1e-12)
        assert float(sums.cosine()[feature]) == pytest.approx(x @ y / math.sqrt((x @ x) * (y @ y)), abs=1e-12)
        assert float(sums.rms_ratio()[feature]) == pytest.approx(math.sqrt((y @ y) / (x @ x)), abs=1e-12)
        assert float(sums.mean_ratio()[feature]) == pytest.approx(y.sum() / x.sum(), abs=1e-12)
        assert float(sums.mse()[feature]) == pytest.approx(((x - y) ** 2).mean(), abs=1e-12)
        assert float(sums.fvu()[feature]) == pytest.approx(((x - y) ** 2).sum() / (x @ x), abs=1e-12)
    assert math.isnan(float(got[2]))
    assert math.isnan(float(sums.pearson()[2]))


def test_errors_are_those_of_the_linearisation(folds):
    sums = sums_of(folds)
    found = sums.r2()
    for feature in (0, 1):
        spread = ratio_spread(sums.errors[:, feature], sums.deviations[:, feature])
        want = spread.around(float(found.value[feature]))
        got = found[feature]
        assert (got.low, got.value, got.high) == pytest.approx((want.low, want.value, want.high), abs=1e-12)
    other = PairSums.stack([PairSums.of(torch.from_numpy(a), torch.from_numpy(a * 0.5)) for a, _ in folds])
    want = r2_score(*(np.concatenate([fold[side][:, 0] for fold in folds]) for side in (0, 1)))
    assert float(sums.over(other).value[0]) == pytest.approx(want - float(other.r2().value[0]), abs=1e-12)
    one = sums.total().r2()
    assert math.isnan(float(one.error[0]))
    assert one.value[:2].tolist() == pytest.approx(found.value[:2].tolist())


def test_empty_folds_take_no_part(folds):
    sums = sums_of(folds)
    empty = PairSums.of(torch.zeros(0, 3), torch.zeros(0, 3))
    padded = PairSums.stack([sums, empty])
    assert padded.r2().error[0] == pytest.approx(float(sums.r2().error[0]))
    assert padded.r2().degrees.tolist() == [3, 3, 3]
    assert padded.take(torch.tensor([1])).r2().value[0] == sums.r2().value[1]


def test_jackknife_is_that_of_single_numbers():
    without = torch.rand(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = jackknifed(without.mean(0), list(without))
    for feature in range(4):
        assert float(found.error[feature]) == pytest.approx(math.sqrt(jackknife(without[:, feature].tolist()).variance))
    assert math.isnan(float(jackknifed(without[0], []).error[0]))


def test_p_values_are_those_of_students_t():
    found = Estimates(*(torch.tensor([value], dtype=torch.float64) for value in (0.7, 0.05, 4.0)))
    assert float(found.above(0.5)) == pytest.approx(stats.t.sf(4, 4))
    assert float(found.below(0.8)) == pytest.approx(stats.t.cdf(-2, 4))
    assert (float(found.low), float(found.high)) == pytest.approx((0.7 - 0.05 * 2.776445, 0.7 + 0.05 * 2.776445), abs=1e-6)


def test_benjamini_hochberg_is_that_of_scipy():
    p = np.random.default_rng(0).uniform(size=50) ** 2
    got = benjamini_hochberg(torch.tensor([math.nan, *p, math.nan], dtype=torch.float64))
    np.testing.assert_allclose(got[1:-1].numpy(), stats.false_discovery_control(p), atol=1e-14)
    assert torch.isnan(got[[0, -1]]).all()
    assert torch.isnan(benjamini_hochberg(torch.full((3,), math.nan, dtype=torch.float64))).all()


def test_quantiles_say_how_much_they_are_of():
    got = quantiles(torch.tensor([1.0, math.nan, 3.0, 2.0], dtype=torch.float64))
    assert (got["features"], got["known"], got["0.5"]) == (4, 3, 2.0)
    assert math.isnan(quantiles(torch.tensor([math.nan], dtype=torch.float64))["0.5"])


# ---- verdicts --------------------------------------------------------------------------------------------------------------


def estimates(*pairs):
    value, error = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    return Estimates(value, error, torch.full_like(value, 9.0))


def test_every_verdict_and_its_limits():
    r2 = estimates((0.9, 0.01), (0.9, 0.01), (0.0, 0.01), (0.35, 0.01), (0.35, 0.2), (0.52, 0.05), (0.9, math.nan), (0.9, 0.01))
    ceiling = estimates((0.95, 0.01), (0.95, 0.01), (0.05, 0.01), (0.4, 0.01), (0.4, 0.01), (0.9, 0.01), (0.9, 0.01), (0.95, 0.01))
    null = estimates(*[(0.5, 0.01)] * 7, (0.0, 0.5))
    identity = estimates((0.8, 0.01), *[(0.1, 0.01)] * 7)
    got = judge(r2, ceiling, null, identity)
    names = [got.name(place) for place in range(8)]
    assert names == [
        "transported (carried)",
        "transported (mapped)",
        "synthesised",
        "mixed",
        "undetermined",
        "undetermined",
        "undetermined",
        "undetermined",
    ]
    assert got.counts() == {"undetermined": 4, "transported": 2, "synthesised": 1, "mixed": 1, "carried": 1}
    assert got.counts(torch.tensor([True, False, True, *[False] * 5]))["transported"] == 1
    strict = judge(r2, ceiling, null, identity, Thresholds(high=0.95, low=0.02))
    assert VERDICTS[int(strict.code[0])] == "mixed" or VERDICTS[int(strict.code[0])] == "undetermined"
    assert int(strict.code[2]) == 0


def test_relative_to_the_ceiling():
    got = relative(estimates((0.6, 0.02), (0.1, 0.01)), estimates((0.8, 0.04), (0.06, 0.04)))
    assert float(got.value[0]) == pytest.approx(0.75)
    assert float(got.error[0]) == pytest.approx(math.hypot(0.02 / 0.8, 0.6 * 0.04 / 0.64))
    assert math.isnan(float(got.value[1]))


@pytest.mark.parametrize("wrong", [{"high": 0.1}, {"low": 0.6}, {"rate": 0.0}, {"ceiling": 1.0}])
def test_thresholds_in_order(wrong):
    with pytest.raises(MomentsError, match="low < high"):
        Thresholds(**wrong)


def test_share_of_what_is_unknown_is_nan():
    one = torch.ones(2, 1, dtype=torch.float64)
    assert math.isnan(float(share(one, one * 2, one, torch.tensor([False])).value))
