"""Efficiency of operators of each rank, ours and the paper's, on planted data and against direct computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import Ridge
from test_cca import read
from test_regression import regression

from nnato.accumulation import accumulate
from nnato.cca import EffectiveSize, debias, noise_edge, participation_ratio
from nnato.corpus import Corpus
from nnato.efficiency import (
    PairRows,
    _ratio,
    _Replicate,
    _without,
    default_ranks,
    efficiency,
    paper_efficiencies,
    paper_efficiency,
    transport_efficiency,
)
from nnato.errors import MomentsError
from nnato.intervals import Spread, jackknife, ratio_spread
from nnato.regression import Regression
from nnato.selection import PAPER_ALPHAS
from nnato.sites import ResidualSite

PAIR = ResidualSite(1), ResidualSite(3)


def linear(rng, sequences, width=8, length=20, noise=0.5, documents=1.0):
    """Sequences of a noisy linear system, whose tokens share a document's direction."""
    mix = np.random.default_rng(11).normal(size=(width, width)) * np.logspace(0, -1, width)
    x = rng.normal(size=(sequences, length, width)) + documents * rng.normal(size=(sequences, 1, width))
    return x, x @ mix + noise * rng.normal(size=x.shape)


def rows_of(rng, sequences=(400, 200, 200), folds=10, **settings):
    parts = [linear(rng, count, **settings) for count in sequences]
    _, train, null = read(*parts[0], folds=folds)
    width = parts[0][0].shape[-1]
    validation = regression(*(part.reshape(-1, width) for part in parts[1]))
    return PairRows(train, validation, read(*parts[2], folds=folds)[1], null), parts


@pytest.fixture(scope="module")
def planted():
    return rows_of(np.random.default_rng(0), (800, 200, 2000), documents=0.0)


def test_a_linear_system_is_transported_efficiently_at_every_rank(planted):
    """METHODS acceptance 21."""
    got = efficiency(PAIR, planted[0])
    assert [point.rank for point in got.points] == list(range(1, 9))
    for point in got.points:
        assert 0.98 <= point.efficiency.value <= 1.02
        assert point.efficiency.low < point.efficiency.value < point.efficiency.high
        assert point.ceilings["cross_fitted"] <= point.ceilings["in_sample"]
    low, value, high = (getattr(got.sum_debiased, name) for name in ("low", "value", "high"))
    assert low < value < high
    assert value == pytest.approx(float(got.correlations.debiased.sum()))


def test_curves_are_those_of_rows(planted):
    """R² of each rank on materialised test rows, from an independent reduced-rank regression."""
    rows, parts = planted
    got = efficiency(PAIR, rows, ranks=[2, 5, 8])
    (x, y), (test_x, test_y) = (tuple(part.reshape(-1, 8) for part in parts[one]) for one in (0, 2))
    root = np.linalg.cholesky(np.linalg.inv((y - y.mean(0)).T @ (y - y.mean(0))))
    rows_x = np.vstack([x - x.mean(0), math.sqrt(got.alpha) * np.eye(8)])
    full = np.linalg.lstsq(rows_x, np.vstack([(y - y.mean(0)) @ root, np.zeros((8, 8))]), rcond=None)[0]
    axes = np.linalg.svd(rows_x @ full, full_matrices=False)[2]
    total = (((test_y - y.mean(0)) @ root) ** 2).sum()
    for point in got.points:
        predicted = (test_x - x.mean(0)) @ full @ axes[: point.rank].T @ axes[: point.rank]
        r2 = 1 - ((((test_y - y.mean(0)) @ root) - predicted) ** 2).sum() / total
        assert point.r2.value == pytest.approx(r2, abs=1e-9)
        ceiling = float(got.correlations.debiased[: point.rank].sum()) / 8
        assert point.ceilings["debiased"] == pytest.approx(ceiling)
        assert point.efficiency.value == pytest.approx(r2 / ceiling, abs=1e-9)


def test_a_replicate_is_made_anew_without_its_fold(planted):
    """The penalty scales with the tokens, the noise edge with what they are worth, and whitening is that of the other folds."""
    rows, parts = planted
    train, test = Regression.merge(rows.folds), Regression.merge(rows.tests)
    size, alpha = EffectiveSize(5000.0, 0, noise_edge(8, 8, 5000.0)), 5000.0
    got = _without(train, rows.folds[3], test, alpha, size, [2, 8])
    chosen = np.arange(800) % 10 != 3
    x, y = (part[chosen].reshape(-1, 8) for part in parts[0])
    test_x, test_y = (part.reshape(-1, 8) for part in parts[2])
    x_mean, y_mean = x.mean(0), y.mean(0)
    root = np.linalg.cholesky(np.linalg.inv((y - y_mean).T @ (y - y_mean)))
    rows_x = np.vstack([x - x_mean, math.sqrt(0.9 * alpha) * np.eye(8)])
    full = np.linalg.lstsq(rows_x, np.vstack([(y - y_mean) @ root, np.zeros((8, 8))]), rcond=None)[0]
    axes = np.linalg.svd(rows_x @ full, full_matrices=False)[2]
    qx, qy = (np.linalg.qr(part - part.mean(0))[0] for part in (x, y))
    squares = torch.from_numpy(np.linalg.svd(qx.T @ qy, compute_uv=False) ** 2)
    debiased = debias(squares, (8, 8), EffectiveSize(4500.0, 0, noise_edge(8, 8, 4500.0)))
    assert got.total == pytest.approx(float(debiased.sum()), rel=1e-9)
    for number, rank in enumerate((2, 8)):
        error = (test_y - y_mean) @ root - (test_x - x_mean) @ full @ axes[:rank].T @ axes[:rank]
        r2 = 1 - (error**2).sum() / (((test_y - y_mean) @ root) ** 2).sum()
        assert float(got.efficiency[number]) == pytest.approx(r2 / (float(debiased[:rank].sum()) / 8), rel=1e-8)


def test_intervals_join_training_and_test_documents():
    replicates = [_Replicate(torch.tensor([value], dtype=torch.float64), 0.0) for value in (0.8, 0.9, 1.0, 0.85)]
    errors, totals = torch.tensor([[1.0], [1.2], [0.9]], dtype=torch.float64), torch.tensor([2.0, 2.1, 1.9], dtype=torch.float64)
    got = _ratio(0.5, 0.6, 0, errors, totals, replicates)
    over_train = jackknife([0.8, 0.9, 1.0, 0.85])
    over_test = ratio_spread(errors[:, 0], totals)
    want = Spread(over_train.variance + over_test.variance / 0.36, 1.0)
    degrees = (over_train + over_test.scaled(1 / 0.6)).degrees
    half = stats.t.ppf(0.975, degrees) * math.sqrt(want.variance)
    assert (got.value, got.low, got.high) == pytest.approx((0.5 / 0.6, 0.5 / 0.6 - half, 0.5 / 0.6 + half))
    assert math.isnan(_ratio(0.5, 0.0, 0, errors, totals, replicates).value)


@pytest.mark.slow
def test_intervals_cover_in_two_hundred_simulations():
    """METHODS acceptance 21: with many tokens a dimension, the efficiency of a linear system is 1; nominal 95 %."""
    covered, repeats = np.zeros(2), 200
    for seed in range(repeats):
        rows, _ = rows_of(np.random.default_rng(1000 + seed), (200, 60, 100), width=3, documents=0.5)
        interval = efficiency(PAIR, rows, ranks=[1, 3])
        covered += [point.efficiency.low <= 1 <= point.efficiency.high for point in interval.points]
    assert (covered / repeats >= 0.90).all(), covered / repeats
    assert (covered / repeats <= 0.99).all(), covered / repeats


def test_independent_data_have_no_efficiency():
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(200, 20, 8)), rng.normal(size=(200, 20, 8))
    _, folds, null = read(x, y)
    whole = regression(x.reshape(-1, 8), y.reshape(-1, 8))
    got = efficiency(PAIR, PairRows(folds, whole, folds, null))
    assert got.correlations.dimensions == 0
    assert all(math.isnan(point.efficiency.value) for point in got.points)


def test_one_fold_has_values_without_intervals(planted):
    rows, parts = planted
    one = PairRows([regression(*(part.reshape(-1, 8) for part in parts[0]))], rows.validation, rows.tests, rows.null)
    got = efficiency(PAIR, one)
    assert got.to_json()["sum_rho2"]["cross_fitted"] is None
    assert math.isnan(got.points[0].efficiency.low)
    assert got.points[0].efficiency.value == pytest.approx(efficiency(PAIR, rows).points[0].efficiency.value, abs=1e-9)


def test_the_papers_protocol_equals_a_direct_implementation(planted):
    """Steps D, G, G′ and G″ of METHODS §2.2 on materialised rows, with the calibrated intercept c."""
    rows, parts = planted
    got = paper_efficiency(PAIR, rows, ranks=[1, 3, 6, 8])
    assert got.alpha in PAPER_ALPHAS
    order = np.concatenate([np.arange(800)[fold::10] for fold in range(10)])
    x, y = (part[order].reshape(-1, 8) for part in parts[0])
    test_x, test_y = (part.reshape(-1, 8) for part in parts[2])
    fitted = Ridge(alpha=got.alpha, solver="svd").fit(x, y)
    left, values, right = np.linalg.svd(fitted.coef_.T)
    eigenvalues, axes = np.linalg.eigh(y.T @ y / len(y))
    whiten = axes / np.sqrt(eigenvalues) @ axes.T
    roots = []
    for part in (x, y):
        eigenvalues, axes = np.linalg.eigh(np.cov(part.T, bias=True))
        roots.append(axes / np.sqrt(eigenvalues) @ axes.T)
    rho = np.linalg.svd(roots[0] @ ((x - x.mean(0)).T @ (y - y.mean(0)) / len(x)) @ roots[1], compute_uv=False)
    for number, rank in enumerate(got.ranks):
        weight = left[:, :rank] * values[:rank] @ right[:rank]
        predicted = test_x @ weight + fitted.intercept_
        shift = (y - x @ weight - fitted.intercept_).mean(0)
        r2 = 1 - (((test_y - predicted - shift) @ whiten) ** 2).sum() / (((test_y - y.mean(0)) @ whiten) ** 2).sum()
        assert got.r2[number] == pytest.approx(r2, abs=1e-8)
        ceiling = (rho[:rank] ** 2).sum() / 8
        assert got.ceilings[number] == pytest.approx(ceiling, abs=1e-8)
        assert got.efficiency[number] == pytest.approx(r2 / ceiling, abs=1e-8)
    assert got.dim_lin == pytest.approx(rho.sum() ** 2 / (rho**2).sum())
    assert got.mean_efficiency == pytest.approx(np.mean(got.efficiency))
    assert paper_efficiency(PAIR, rows).ranks == (1, 8)


@pytest.fixture
def accumulated(model, corpus):
    return accumulate(model, corpus, [(0, 3), (1, 3), (0, 2)])


def test_efficiencies_of_a_model(accumulated):
    results = transport_efficiency(accumulated, force=True)
    assert [result.pair for result in results] == [(0, 2), (0, 3), (1, 3)]
    record = results[1].to_json()
    assert {"source", "target", "sum_rho2", "n_eff", "lts_dimensions", "participation_ratio", "participation_ratio_shuffled"} <= set(record)
    assert set(record["sum_rho2"]) == {"in_sample", "cross_fitted", "debiased"}
    assert {"rank", "value", "low", "high"} <= set(record["efficiency"][0])
    found = results[1].correlations
    assert record["participation_ratio_shuffled"] == participation_ratio(found.null)
    assert record["n_eff"] == found.size.n
    assert record["n"] == accumulated.tokens["train"]
    assert list(results[0].angles) == []
    assert list(results[1].angles) == [1]
    assert list(results[2].angles) == [0]
    torch.testing.assert_close(results[1].angles[1], results[2].angles[0], atol=1e-4, rtol=0)
    assert (record["overlaps"][0]["source"], record["overlaps"][0]["rank"]) == (1, len(results[1].angles[1]))
    assert [result.pair for result in paper_efficiencies(accumulated, [(0, 3)])] == [(0, 3)]


def test_bad_requests_are_refused(model, corpus, accumulated):
    with pytest.raises(MomentsError, match=r"ranks \[0\]: give numbers from 1 to 16"):
        transport_efficiency(accumulated, ranks=[0])
    with pytest.raises(MomentsError, match="do not hold the pair 1:2"):
        transport_efficiency(accumulated, [(1, 2)], force=True)
    few = accumulate(model, Corpus(corpus.source, context=32, per_document=None, folds=2), [(0, 3)])
    with pytest.raises(MomentsError, match="5 folds were asked for, and training documents are kept in 2"):
        paper_efficiencies(few)


def test_ranks_by_default_are_spread_on_a_log_scale():
    assert default_ranks(8) == list(range(1, 9))
    ranks = default_ranks(640)
    assert (ranks[0], ranks[-1]) == (1, 640)
    assert len(ranks) <= 24
