"""Regression problems from moments: algebra of folds, changes of coordinates, against numpy on materialised rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnato.errors import MomentsError
from nnato.moments import Moments
from nnato.regression import Frame, Regression
from nnato.sites import ResidualSite

S, T = ResidualSite(1), ResidualSite(3)


def rows(n, d_x=6, d_y=5, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d_x)) * np.logspace(0, 1, d_x) + 30
    return x, x[:, :d_y] - 2 * x[:, -1:] + rng.normal(size=(n, d_y)) - 7


def regression(x, y):
    dx, dy = x - x.mean(0), y - y.mean(0)
    parts = (x.mean(0), y.mean(0), dx.T @ dx, dx.T @ dy, dy.T @ dy)
    return Regression(len(x), *(torch.from_numpy(part) for part in parts))


def assert_same(got, want, tolerance=1e-12):
    assert got.n == want.n
    for name in ("x_mean", "y_mean", "xx", "xy", "yy"):
        a, b = getattr(got, name), getattr(want, name)
        assert float((a - b).abs().max()) <= tolerance * float(b.abs().max()), name


def test_reads_a_pair_of_moments():
    x, y = rows(40, 6, 6)
    moments = Moments.of_pairs([(S, T)], 6)
    moments.update(torch.from_numpy(np.stack([x, y])))
    assert_same(Regression.of(moments, (S, T)), regression(x, y))


def test_merge_and_without_are_those_of_the_rows():
    x, y = rows(90)
    cuts = [(0, 20), (20, 21), (21, 60), (60, 90)]
    parts = [regression(x[a:b], y[a:b]) for a, b in cuts]
    whole = Regression.merge(parts)
    assert_same(whole, regression(x, y))
    keep = np.r_[0:21, 60:90]
    assert_same(whole.without(parts[2]), regression(x[keep], y[keep]), 1e-11)
    with pytest.raises(MomentsError, match="no tokens outside this fold"):
        whole.without(whole)
    with pytest.raises(MomentsError, match="no tokens in these folds"):
        Regression.merge([])


def test_moments_about_other_means():
    x, y = rows(50)
    a, b = regression(x[:20], y[:20]), regression(x[20:], y[20:])
    dx, dy = x[20:] - x[:20].mean(0), y[20:] - y[:20].mean(0)
    moved = b.about(a)
    for got, want in ((moved.xx, dx.T @ dx), (moved.xy, dx.T @ dy), (moved.yy, dy.T @ dy)):
        assert np.abs(got.numpy() - want).max() <= 1e-12 * np.abs(want).max()


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("with_prior", [False, True])
def test_frames_are_those_of_transformed_rows(standardize, with_prior):
    x, y = rows(70)
    prior = torch.from_numpy(np.random.default_rng(3).normal(size=(6, 5))) if with_prior else None
    train = regression(x[:50], y[:50])
    frame = Frame.of(train, standardize, prior)
    target = y - x @ prior.numpy() if with_prior else y
    sx, sy = (x[:50].std(0), target[:50].std(0)) if standardize else (1.0, 1.0)
    assert_same(frame.apply(regression(x[50:], y[50:])), regression(x[50:] / sx, target[50:] / sy), 1e-11)
    # A map in these coordinates predicts, restored, what it predicts there.
    weight = np.random.default_rng(4).normal(size=(6, 5))
    want = (x / sx) @ weight * sy + (x @ prior.numpy() if with_prior else 0)
    got = x @ frame.restore(torch.from_numpy(weight)).numpy()
    assert np.abs(got - want).max() <= 1e-11 * np.abs(want).max()


def test_constant_coordinates_keep_their_scale():
    x, y = rows(30)
    x[:, 2] = 4.0
    frame = Frame.of(regression(x, y), standardize=True)
    assert float(frame.x_scale[2]) == 1.0
    assert bool(torch.isfinite(frame.apply(regression(x, y)).xx).all())


def test_priors_of_another_shape_are_refused():
    with pytest.raises(MomentsError, match=r"the prior has shape \(5, 5\), the operator \(6, 5\)"):
        Frame.of(regression(*rows(20)), prior=torch.eye(5, dtype=torch.float64))
