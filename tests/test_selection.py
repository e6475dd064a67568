"""Methods of fitting and choosing, as a pure function of moments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import ElasticNet, Lasso, Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from test_lowrank import rows
from test_regression import regression

from nnato.errors import MomentsError
from nnato.lowrank import reduced_rank
from nnato.metrics import METRICS, Weighting
from nnato.regression import Regression
from nnato.ridge import KAPPAS, RidgeSource, direct_errors, score_path, screen
from nnato.selection import PAPER_ALPHAS, SPARSE_KAPPAS, Method, Solver, group_folds
from nnato.sparse import zero_penalty


@pytest.fixture(scope="module")
def data():
    return {"train": rows(500, 0), "validation": rows(200, 1)}


@pytest.fixture(scope="module")
def folds(data):
    x, y = data["train"]
    return [regression(x[held], y[held]) for _, held in KFold(5).split(x)]


def test_the_papers_choice_equals_grid_search(data, folds):
    x, y = data["train"]
    search = GridSearchCV(Ridge(solver="svd"), {"alpha": list(PAPER_ALPHAS)}, cv=KFold(5), scoring="r2").fit(x, y)
    solution = Solver(Method.paper()).solve(Regression.merge(folds), folds=folds)
    assert solution.alpha == search.best_params_["alpha"]
    assert np.abs(np.array(solution.path.scores) - search.cv_results_["mean_test_score"]).max() <= 1e-9
    want = search.best_estimator_.coef_.T
    assert np.abs(solution.weight.numpy() - want).max() <= 1e-9 * np.abs(want).max()


@pytest.mark.parametrize("average", ["mean", "pooled"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("standardize", [False, True])
def test_a_screened_search_chooses_what_a_full_one_does(folds, metric, average, standardize):
    train, grid = Regression.merge(folds), (1e-2, 1.0, 10.0, 100.0, 1e3, 1e5)
    settings = {"metric": metric, "select": "kfold", "average": average, "standardize": standardize, "alphas": grid}
    full = Solver(Method(**settings)).solve(train, folds=folds)
    screened = Solver(Method(**settings, search="screened")).solve(train, folds=folds)
    assert screened.alpha == full.alpha
    torch.testing.assert_close(screened.weight, full.weight, atol=1e-9, rtol=1e-9)
    assert screened.path.scores[screened.path.best] == pytest.approx(full.path.scores[full.path.best], abs=0.05)  # estimated, perhaps
    trials = list(Solver(Method(**settings))._trials(train, folds))
    estimated, kept = screen(trials, folds, grid, train, metric, average)
    assert full.path.best in kept
    assert len(kept) < len(grid)
    assert np.abs(np.array(estimated.scores) - full.path.scores).max() <= 0.05
    exact = score_path(trials, folds, grid, train, metric, average, direct_errors)
    assert exact.scores == pytest.approx(full.path.scores, abs=1e-9)


def test_a_screened_search_on_validation_rows(data):
    train, held = regression(*data["train"]), regression(*data["validation"])
    full, screened = (Solver(Method(search=search)).solve(train, held) for search in ("full", "screened"))
    assert screened.kappa == full.kappa
    assert screened.path.at_edge == full.path.at_edge
    assert len(screened.path.scores) == len(KAPPAS)


def test_scales_come_from_the_training_rows_of_each_fold(data, folds):
    x, y = data["train"]
    grid = {"ridge__alpha": [0.1, 10.0, 1000.0]}
    search = GridSearchCV(make_pipeline(StandardScaler(), Ridge(solver="svd")), grid, cv=KFold(5), scoring="r2").fit(x, y)
    method = Method(metric="uniform", select="kfold", average="mean", standardize=True, alphas=(0.1, 10.0, 1000.0))
    solution = Solver(method).solve(Regression.merge(folds), folds=folds)
    assert np.abs(np.array(solution.path.scores) - search.cv_results_["mean_test_score"]).max() <= 1e-9
    assert solution.alpha == search.best_params_["ridge__alpha"]


@pytest.mark.parametrize("penalty", ["lasso", "elastic-net"])
@pytest.mark.parametrize("select", ["validation", "kfold"])
def test_sparse_operators_are_those_of_scikit_learn(data, folds, penalty, select):
    (x, y), (held_x, held_y) = data["train"], data["validation"]
    train = Regression.merge(folds)
    method = Method(metric="uniform", penalty=penalty, select=select, average="mean")
    solution = Solver(method).solve(train, regression(held_x, held_y), folds)
    unit = zero_penalty(train, method.ratio)
    assert solution.path.penalties == pytest.approx([kappa * unit for kappa in SPARSE_KAPPAS])
    scores = []
    for alpha in solution.path.penalties:
        settings = {"alpha": alpha, "tol": 1e-10, "max_iter": 50000}
        estimator = Lasso(**settings) if penalty == "lasso" else ElasticNet(l1_ratio=0.5, **settings)
        if select == "validation":
            scores.append(r2_score(held_y, estimator.fit(x, y).predict(held_x)))
        else:
            scores.append(np.mean([r2_score(y[h], estimator.fit(x[r], y[r]).predict(x[h])) for r, h in KFold(5).split(x)]))
    assert np.abs(np.array(solution.path.scores) - scores).max() <= 1e-3  # theirs to 1e-10, ours to a gap of 1e-4
    assert scores[solution.path.best] >= max(scores) - 1e-3
    assert solution.kappa == SPARSE_KAPPAS[solution.path.best]
    assert solution.sparse.converged
    assert bool((solution.weight == 0).any())


def test_gcv_and_folds_choose_alike(data, folds):
    """All rows are independent here, so generalised cross-validation is right."""
    train = Regression.merge(folds)
    choices = {
        select: KAPPAS.index(Solver(Method(select=select)).solve(train, regression(*data["validation"]), folds).kappa)
        for select in ("validation", "kfold", "gcv")
    }
    assert max(choices.values()) - min(choices.values()) <= 2, choices


def test_scales_and_priors_reach_the_solution(data):
    (x, y), held = data["train"], regression(*data["validation"])
    train = regression(x, y)
    scaled = Solver(Method(standardize=True, kappas=(1e-3,))).solve(train, held)
    z = (x - x.mean(0)) / x.std(0)
    want = (Ridge(alpha=1e-3 * len(x), solver="svd").fit(z, y).coef_ / x.std(0)).T
    assert np.abs(scaled.weight.numpy() - want).max() <= 1e-9 * np.abs(want).max()
    assert scaled.alpha == pytest.approx(1e-3 * len(x))
    square = regression(x, x @ np.diag(np.linspace(0.5, 1.5, 10)))
    back = Solver(Method(shrink_to="identity", kappas=(1e12,))).solve(square, square)
    torch.testing.assert_close(back.weight, torch.eye(10, dtype=torch.float64), atol=1e-6, rtol=0)


def test_rank_is_reduced_in_the_metric_of_the_choice(data):
    train, held = regression(*data["train"]), regression(*data["validation"])
    solution = Solver(Method(rank=3)).solve(train, held)
    assert int(torch.linalg.matrix_rank(solution.weight)) == 3
    want = reduced_rank(RidgeSource(train.xx), train, solution.alpha, Weighting()).weight(3)
    torch.testing.assert_close(solution.weight, want)


def test_one_solver_serves_all_targets_of_a_source(data, folds):
    solver = Solver(Method(select="kfold"))
    one = solver.solve(Regression.merge(folds), folds=folds)
    again = solver.solve(Regression.merge(folds), folds=folds)
    assert bool((one.weight == again.weight).all())
    fresh = Solver(Method(select="kfold")).solve(Regression.merge(folds), folds=folds)
    assert bool((one.weight == fresh.weight).all())


def test_folds_are_grouped_evenly(folds):
    grouped = group_folds(folds, 2)
    assert [group.n for group in grouped] == [300, 200]
    assert group_folds(folds, None) == folds
    with pytest.raises(MomentsError, match="6 folds were asked for, and training documents are kept in 5"):
        group_folds(folds, 6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "r2"}, "unknown metric 'r2'"),
        ({"select": "loo"}, "unknown selection 'loo'; known are validation, kfold, gcv"),
        ({"penalty": "l0"}, "unknown penalty 'l0'; known are ridge, lasso, elastic-net"),
        ({"shrink_to": "one"}, "unknown prior 'one'; known are zero, identity"),
        ({"penalty": "lasso", "select": "gcv"}, "of ridge only: choose the lasso on validation or by kfold"),
        ({"search": "random"}, "unknown search 'random'; known are full, screened"),
        ({"penalty": "lasso", "search": "screened"}, "a screened search is of ridge, on validation or by kfold"),
        ({"select": "gcv", "search": "screened"}, "a screened search is of ridge, on validation or by kfold"),
        ({"penalty": "lasso", "rank": 3}, "the lasso has no rank to choose: use ridge"),
        ({"rank": 0}, "rank 0: give at least 1"),
        ({"groups": 1}, "1 folds: give at least 2"),
        ({"penalty": "elastic-net", "l1_ratio": 1.5}, "l1 ratio 1.5: give a number above 0 and up to 1"),
        ({"kappas": ()}, r"kappas \(\): give positive numbers"),
        ({"kappas": (0.0,)}, "give positive numbers"),
        ({"alphas": (float("inf"),)}, "give positive numbers"),
        ({"kappas": (1.0,), "alphas": (1.0,)}, "as kappas or as alphas, not both"),
    ],
)
def test_bad_methods_are_refused(settings, message):
    with pytest.raises(MomentsError, match=message):
        Method(**settings)


def test_missing_rows_are_refused(data):
    train = regression(*data["train"])
    with pytest.raises(MomentsError, match="selection on validation needs validation rows"):
        Solver(Method()).solve(train)
    with pytest.raises(MomentsError, match="at least two folds of training documents, and there are 1"):
        Solver(Method(select="kfold")).solve(train, folds=[train])
