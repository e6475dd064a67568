"""Operators of every rank: against direct minimisation, rank by rank, and in sample against the canonical-correlation ceiling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from test_regression import regression

from nnato.errors import MomentsError
from nnato.lowrank import reduced_rank, truncated
from nnato.metrics import METRICS, Weighting, weighting
from nnato.ridge import RidgeSource

D_X, D_Y = 10, 8


def rows(n, seed):
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(7).normal(size=(D_X, D_Y)) * np.logspace(0, -2, D_Y)
    x = rng.normal(size=(n, D_X)) * np.logspace(0.5, -1, D_X) + 3
    return x, x @ mix + 0.3 * rng.normal(size=(n, D_Y)) * np.logspace(-1, 0.5, D_Y)


@pytest.fixture(scope="module")
def data():
    return {"train": rows(400, 0), "test": rows(300, 1)}


def dense(weigh):
    root = weigh.factors(D_Y)[0]
    return (root @ root.T).numpy()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("alpha", [1e-6, 5.0])
def test_reduced_rank_is_the_minimiser_of_its_objective(data, metric, alpha):
    """By augmenting the rows, ridge becomes least squares, whose best map of rank r projects the fitted values on their main axes."""
    x, y = data["train"]
    train = regression(x, y)
    weigh = weighting(metric, train.yy, train.yy)
    root = np.linalg.cholesky(dense(weigh))
    rows_x = np.vstack([x - x.mean(0), np.sqrt(alpha) * np.eye(D_X)])
    rows_y = np.vstack([(y - y.mean(0)) @ root, np.zeros((D_X, D_Y))])
    full = np.linalg.lstsq(rows_x, rows_y, rcond=None)[0]
    axes = np.linalg.svd(rows_x @ full, full_matrices=False)[2]
    path = reduced_rank(RidgeSource(train.xx), train, alpha, weigh)
    assert path.ranks == D_Y
    total = (rows_y**2).sum()
    for rank in range(1, D_Y + 1):
        want = full @ axes[:rank].T @ axes[:rank] @ np.linalg.inv(root)
        assert np.abs(path.weight(rank).numpy() - want).max() <= 1e-8 * np.abs(want).max()
        objective = ((rows_y - rows_x @ want @ root) ** 2).sum()
        assert total - float(path.gains[:rank].sum()) == pytest.approx(objective, rel=1e-9)
    whole = Ridge(alpha=alpha, solver="svd").fit(x, y).coef_.T
    assert np.abs(path.weight(D_Y).numpy() - whole).max() <= 1e-8 * np.abs(whole).max()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["reduced", "truncated"])
def test_the_whole_rank_curve_equals_rank_by_rank_errors(data, metric, kind):
    train, (x, y) = regression(*data["train"]), data["test"]
    weigh = weighting(metric, train.yy, regression(x, y).yy)
    source = RidgeSource(train.xx)
    path = reduced_rank(source, train, 2.0, weigh) if kind == "reduced" else truncated(source.weight(train.xy, 2.0))
    curve = path.errors(regression(x, y).about(train), weigh)
    for rank in range(1, path.ranks + 1):
        error = (y - train.y_mean.numpy()) - (x - train.x_mean.numpy()) @ path.weight(rank).numpy()
        assert float(curve[rank - 1]) == pytest.approx(np.trace(dense(weigh) @ error.T @ error), rel=1e-9)


def test_in_sample_least_squares_reaches_the_ceiling_at_every_rank_and_truncation_never_more(data):
    """METHODS acceptance 12."""
    x, y = data["train"]
    train = regression(x, y)
    weigh = weighting("whitened", train.yy, train.yy)
    source = RidgeSource(train.xx)
    qx, qy = (np.linalg.qr(part - part.mean(0))[0] for part in (x, y))
    ceiling = (np.linalg.svd(qx.T @ qy, compute_uv=False) ** 2).cumsum() / D_Y
    reduced = 1 - reduced_rank(source, train, 0.0, weigh).errors(train, weigh).numpy() / D_Y
    cut = 1 - truncated(source.weight(train.xy, 0.0)).errors(train, weigh).numpy() / D_Y
    assert np.abs(reduced / ceiling - 1).max() <= 1e-6
    assert (cut <= reduced + 1e-12).all()
    assert (cut[:-1] < reduced[:-1] - 0.01).any()


def test_ranks_beyond_the_support_do_not_exist(data):
    x, y = data["train"]
    x = np.hstack([x[:, :3], x[:, :2] @ np.ones((2, 2))])  # rank 3 of 5
    train = regression(x, y)
    path = reduced_rank(RidgeSource(train.xx), train, 1.0, Weighting())
    assert path.ranks == 3
    for rank in (0, 4):
        with pytest.raises(MomentsError, match=f"rank {rank}: choose from 1 to 3"):
            path.weight(rank)
    assert bool(torch.isfinite(path.left).all())
