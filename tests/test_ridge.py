"""Ridge from moments against scikit-learn, and the O(d²) held-out score against the direct one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from nnato.errors import MomentsError
from nnato.linalg import pseudo_inverse, spectrum
from nnato.metrics import METRICS, Weighting, error_matrix, r2, weighting
from nnato.moments import Moments
from nnato.ridge import KAPPAS, RidgeSource, fit_ridge
from nnato.sites import ResidualSite

S, T = ResidualSite(1), ResidualSite(3)


def make(n, d=12, seed=0):
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(d, d)) / np.sqrt(d)
    scales = np.logspace(0, 2, d)
    x = rng.normal(size=(n, d)) * scales + 50
    y = x @ mix + rng.normal(size=(n, d)) * 3 - 20
    return x, y


def moments_of(x, y):
    moments = Moments.of_pairs([(S, T)], x.shape[1])
    moments.update(torch.from_numpy(np.stack([x, y])))
    return moments


@pytest.fixture(scope="module")
def data():
    return {"train": make(300), "validation": make(120, seed=1), "test": make(150, seed=2)}


@pytest.fixture(scope="module")
def moments(data):
    return {split: moments_of(*xy) for split, xy in data.items()}


@pytest.mark.parametrize("kappa", KAPPAS)
def test_ridge_equals_scikit_learn_at_every_penalty(data, moments, kappa):
    fit = fit_ridge(RidgeSource(moments["train"], S), T, moments["validation"], Weighting(), (kappa,))
    x, y = data["train"]
    reference = Ridge(alpha=fit.alpha, solver="svd").fit(x, y)
    scale = np.abs(reference.coef_).max()
    assert np.abs(fit.weight.numpy() - reference.coef_.T).max() <= 1e-9 * scale
    assert np.abs(fit.bias.numpy() - reference.intercept_).max() <= 1e-9 * np.abs(reference.intercept_).max()
    assert fit.alpha == pytest.approx(kappa * ((x - x.mean(0)) ** 2).sum() / x.shape[1], rel=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_scores_of_the_whole_path_equal_direct_ones_and_the_best_is_chosen(data, moments, metric):
    x, y = data["validation"]
    train_yy = moments["train"].scatter_of(T, T)
    weigh = weighting(metric, train_yy, moments["validation"].scatter_of(T, T))
    fit = fit_ridge(RidgeSource(moments["train"], S), T, moments["validation"], weigh)
    direct = []
    for kappa in KAPPAS:
        reference = Ridge(alpha=kappa * fit.alpha / fit.kappa, solver="svd").fit(*data["train"])
        predicted = reference.predict(x)
        if metric == "whitened":
            root = np.linalg.cholesky(np.linalg.inv(train_yy.numpy()))
            error, total = ((y - predicted) @ root) ** 2, ((y - y.mean(0)) @ root) ** 2
            direct.append(1 - error.sum() / total.sum())
        else:
            direct.append(r2_score(y, predicted, multioutput={"uniform": "uniform_average"}.get(metric, metric)))
    assert np.abs(np.array(fit.scores) - direct).max() <= 1e-9
    assert fit.kappa == KAPPAS[int(np.argmax(direct))]


@pytest.mark.parametrize("metric", ["uniform", "variance_weighted"])
def test_r2_equals_scikit_learn_on_test(data, moments, metric):
    fit = fit_ridge(RidgeSource(moments["train"], S), T, moments["validation"], Weighting())
    x, y = data["test"]
    total = moments["test"].scatter_of(T, T)
    got = r2(error_matrix(moments["test"], (S, T), fit.weight, fit.bias), total, weighting(metric, total, total))
    name = "uniform_average" if metric == "uniform" else metric
    assert got == pytest.approx(r2_score(y, x @ fit.weight.numpy() + fit.bias.numpy(), multioutput=name), abs=1e-9)


def test_error_matrix_is_that_of_materialised_predictions(data, moments):
    rng = np.random.default_rng(5)
    weight, bias = rng.normal(size=(12, 12)), rng.normal(size=12)
    x, y = data["test"]
    error = y - x @ weight - bias
    got = error_matrix(moments["test"], (S, T), torch.from_numpy(weight), torch.from_numpy(bias)).numpy()
    assert np.abs(got - error.T @ error).max() <= 1e-11 * np.abs(error.T @ error).max()


def test_penalties_at_the_end_of_the_grid_are_marked(moments):
    source = RidgeSource(moments["train"], S)
    assert fit_ridge(source, T, moments["validation"], Weighting(), (1e1, 1e2)).at_edge
    assert not fit_ridge(source, T, moments["validation"], Weighting(), (1e-9, 1e-4, 1e2)).at_edge


def test_directions_without_variance_get_no_weight():
    x, y = make(200)
    x[:, 3] = 7.0
    fit = fit_ridge(RidgeSource(moments_of(x, y), S), T, moments_of(x, y), Weighting(), (1e-8,))
    assert float(fit.weight[3].abs().max()) <= 1e-12
    reference = Ridge(alpha=fit.alpha, solver="svd").fit(x, y)
    assert np.abs(fit.weight.numpy() - reference.coef_.T).max() <= 1e-9 * np.abs(reference.coef_).max()


def test_the_grid_has_at_least_twenty_penalties():
    assert len(KAPPAS) >= 20
    assert (KAPPAS[0], KAPPAS[-1]) == (pytest.approx(1e-8), pytest.approx(1e2))


@pytest.mark.parametrize("kappas", [(), (0.0,), (-1.0,), (float("inf"),)])
def test_bad_penalties_are_refused(moments, kappas):
    with pytest.raises(MomentsError, match="give positive numbers"):
        fit_ridge(RidgeSource(moments["train"], S), T, moments["validation"], Weighting(), kappas)


def test_unknown_metrics_are_refused():
    with pytest.raises(MomentsError, match="unknown metric 'r2'; known are variance_weighted, uniform, whitened"):
        weighting("r2", torch.eye(2), torch.eye(2))


def test_linalg_refuses_what_has_no_spectrum():
    with pytest.raises(MomentsError, match="not finite"):
        spectrum(torch.full((2, 2), float("nan"), dtype=torch.float64))
    with pytest.raises(MomentsError, match="do not vary"):
        spectrum(torch.zeros(2, 2, dtype=torch.float64))


def test_pseudo_inverse_equals_numpy():
    rng = np.random.default_rng(0)
    half = rng.normal(size=(8, 5))
    matrix = half @ half.T  # rank 5 of 8
    assert np.abs(pseudo_inverse(torch.from_numpy(matrix)).numpy() - np.linalg.pinv(matrix, hermitian=True)).max() <= 1e-9
