"""Lasso and elastic net from moments against scikit-learn (METHODS acceptance 11)."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import ElasticNet, Lasso
from test_regression import regression

from nnato import sparse
from nnato.errors import MomentsError
from nnato.sparse import elastic_net, zero_penalty


def rows(n=300, d_x=90, d_y=6, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d_x)) @ (np.eye(d_x) + 0.3 * rng.normal(size=(d_x, d_x)) / np.sqrt(d_x)) * np.logspace(0, 0.7, d_x) + 5
    weight = rng.normal(size=(d_x, d_y)) * (rng.random((d_x, d_y)) < 0.2)
    return x, x @ weight + rng.normal(size=(n, d_y)) * 3


@pytest.mark.parametrize("l1_ratio", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("kappa", [0.5, 0.05, 0.003])
def test_coefficients_equal_scikit_learn(l1_ratio, kappa):
    x, y = rows()
    train = regression(x, y)
    alpha = kappa * zero_penalty(train, l1_ratio)
    fitted = elastic_net(train, alpha, l1_ratio, tolerance=1e-12, max_sweeps=20000)
    settings = {"alpha": alpha, "tol": 1e-12, "max_iter": 50000}
    reference = Lasso(**settings) if l1_ratio == 1 else ElasticNet(l1_ratio=l1_ratio, **settings)
    want = reference.fit(x, y).coef_.T
    assert fitted.converged
    assert np.abs(fitted.weight.numpy() - want).max() <= 1e-5 * np.abs(want).max()
    assert ((fitted.weight.numpy() != 0) == (np.abs(want) > 1e-9)).mean() > 0.99


def test_the_gap_bounds_the_distance_from_the_optimum():
    x, y = rows()
    train = regression(x, y)
    alpha, l1_ratio = 0.02 * zero_penalty(train, 0.7), 0.7

    def objective(weight):
        error = (y - y.mean(0)) - (x - x.mean(0)) @ weight
        penalty = l1_ratio * np.abs(weight).sum(0) + (1 - l1_ratio) / 2 * (weight**2).sum(0)
        return (error**2).sum(0) / 2 + train.n * alpha * penalty

    best = objective(elastic_net(train, alpha, l1_ratio, tolerance=1e-13, max_sweeps=50000).weight.numpy())
    power = train.yy.diagonal().numpy()
    for tolerance in (1e-1, 1e-3, 1e-5):
        fitted = elastic_net(train, alpha, l1_ratio, tolerance=tolerance)
        assert fitted.converged
        assert 0 <= fitted.gap <= tolerance
        assert ((objective(fitted.weight.numpy()) - best) / power).max() <= fitted.gap + 1e-12


def test_blocks_do_not_change_the_iterates(monkeypatch):
    train = regression(*rows(d_x=70))
    alpha = 0.01 * zero_penalty(train, 1.0)
    blocked = elastic_net(train, alpha, tolerance=1e-30, max_sweeps=7)
    monkeypatch.setattr(sparse, "BLOCK", 1)
    assert float((elastic_net(train, alpha, tolerance=1e-30, max_sweeps=7).weight - blocked.weight).abs().max()) <= 1e-12
    assert (blocked.sweeps, blocked.converged) == (7, False)


def test_a_start_shortens_the_way():
    train = regression(*rows())
    alpha = 0.01 * zero_penalty(train, 1.0)
    near = elastic_net(train, 1.2 * alpha, tolerance=1e-8)
    assert elastic_net(train, alpha, start=near.weight, tolerance=1e-8).sweeps < elastic_net(train, alpha, tolerance=1e-8).sweeps


def test_the_unit_of_the_penalty_is_where_weights_vanish():
    train = regression(*rows())
    alpha = zero_penalty(train, 0.5)
    assert float(elastic_net(train, alpha * 1.0001, 0.5).weight.abs().max()) == 0
    assert float(elastic_net(train, alpha * 0.999, 0.5, tolerance=1e-12).weight.abs().max()) > 0


def test_constant_and_duplicated_columns_give_finite_results():
    x, y = rows(d_x=20)
    x[:, 3], x[:, 5], y[:, 2] = 4.0, x[:, 6], -1.0
    train = regression(x, y)
    fitted = elastic_net(train, 0.05 * zero_penalty(train, 1.0), tolerance=1e-8)
    assert fitted.converged
    assert float(fitted.weight[3].abs().max()) <= 1e-9
    assert float(fitted.weight[:, 2].abs().max()) <= 1e-9
    assert np.isfinite(fitted.weight.numpy()).all()


def test_bad_penalties_are_refused():
    train = regression(*rows(n=20, d_x=3))
    with pytest.raises(MomentsError, match=r"l1 ratio 0.0: give a number above 0 and up to 1"):
        elastic_net(train, 1.0, 0.0)
    with pytest.raises(MomentsError, match="penalty 0.0: give a positive number"):
        elastic_net(train, 0.0)
