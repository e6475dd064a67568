"""From residuals to judged operators: end to end against scikit-learn on materialised activations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import BLOCKS, WIDTH
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from nnato.accumulation import Accumulated, accumulate
from nnato.corpus import Corpus
from nnato.errors import MomentsError, SiteError
from nnato.fitting import BASELINES, fit, operator_file
from nnato.intervals import share_explained
from nnato.metrics import METRICS
from nnato.operators import TransportOperator
from nnato.reduction import TokenClasses, capture
from nnato.regression import Regression
from nnato.ridge import KAPPAS
from nnato.selection import PAPER_ALPHAS, Method
from nnato.sites import ResidualSite
from nnato.statistics import ResidualBatch
from nnato.transport_moments import TransportMoments

S, T = ResidualSite(1), ResidualSite(3)


@pytest.fixture
def accumulated(model, corpus):
    return accumulate(model, corpus, [(0, 2), (0, 3), (1, 3)])


def materialise(model, corpus, tokens):
    """Rows of ordinary (or all) tokens by split, kept in memory."""
    blocks, classes = corpus.tokenize(model.tokenizer), TokenClasses()
    sites = [ResidualSite(site) for site in range(BLOCKS)]
    rows: dict[str, list[torch.Tensor]] = {}
    for numbers in blocks.plan(8):
        batch = blocks.batch(numbers)
        residuals = capture(model, batch.ids, sites)
        ordinary = classes.ordinary(batch.ids, batch.mask, batch.special, residuals)
        rows.setdefault(batch.split, []).append(residuals[:, ordinary if tokens == "ordinary" else batch.mask].double())
    return {split: torch.cat(value, dim=1).numpy() for split, value in rows.items()}


@pytest.mark.parametrize("tokens", ["ordinary", "all"])
@pytest.mark.parametrize("metric", ["variance_weighted", "uniform"])
def test_fit_equals_scikit_learn_on_materialised_activations(model, corpus, accumulated, metric, tokens):
    data = materialise(model, corpus, tokens)
    name = {"uniform": "uniform_average"}.get(metric, metric)
    for result in fit(accumulated, metric=metric, tokens=tokens):
        s, t = (int(site) for site in result.operator.pair)
        unit = np.square(data["train"][s] - data["train"][s].mean(0)).sum() / WIDTH
        fits = [Ridge(alpha=kappa * unit, solver="svd").fit(data["train"][s], data["train"][t]) for kappa in KAPPAS]
        scores = [r2_score(data["validation"][t], one.predict(data["validation"][s]), multioutput=name) for one in fits]
        best = fits[int(np.argmax(scores))]
        assert result.kappa == KAPPAS[int(np.argmax(scores))]
        assert np.abs(result.operator.weight.numpy() - best.coef_.T).max() <= 1e-8 * np.abs(best.coef_).max()
        predicted = best.predict(data["test"][s])
        assert result.mse == pytest.approx(np.square(data["test"][t] - predicted).mean(), rel=1e-9)
        assert result.to_json()["rmse"] == pytest.approx(result.mse**0.5)
        for key, multioutput in (("uniform", "uniform_average"), ("variance_weighted", "variance_weighted")):
            y = data["test"][t]
            assert result.r2[key] == pytest.approx(r2_score(y, predicted, multioutput=multioutput), abs=1e-9)
            x = data["test"][s]
            shift = data["train"][t].mean(0) - data["train"][s].mean(0)
            assert result.baselines["identity"][key] == pytest.approx(r2_score(y, x, multioutput=multioutput), abs=1e-9)
            assert result.baselines["identity_shift"][key] == pytest.approx(r2_score(y, x + shift, multioutput=multioutput), abs=1e-9)
            mean = np.broadcast_to(data["train"][t].mean(0), y.shape)
            assert result.baselines["mean"][key] == pytest.approx(r2_score(y, mean, multioutput=multioutput), abs=1e-9)
        error, baseline = np.square(y - predicted).sum(), np.square(y - x - shift).sum()
        assert result.skill_over_identity["variance_weighted"] == pytest.approx(1 - error / baseline, abs=1e-9)


def test_both_numbers_are_given(accumulated):
    ordinary, everything = fit(accumulated), fit(accumulated, tokens="all")
    for one, other in zip(ordinary, everything, strict=True):
        assert one.r2_all_tokens == pytest.approx(other.r2, abs=1e-12)
        assert other.r2_all_tokens == other.r2
        assert one.r2 != other.r2


def planted(mix, noise, documents=60, length=40, seed=0, outlier=None):
    """Moments of residuals with a planted map from site 1 to site 3."""
    moments = TransportMoments([(S, T)], WIDTH)
    generator = torch.Generator().manual_seed(seed)
    for number, split in enumerate(["train"] * documents + ["validation"] * 20 + ["test"] * 20):
        x = torch.randn(2, length, WIDTH, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, WIDTH, dtype=torch.float64)
        y = x @ mix + noise * torch.randn(2, length, WIDTH, generator=generator, dtype=torch.float64)
        ordinary = torch.ones(2, length, dtype=torch.bool)
        if outlier is not None:
            x[:, 0], y[:, 0] = outlier, outlier
            ordinary[:, 0] = False
        moments.update(
            ResidualBatch(torch.stack([x, y]), (S, T), ordinary, ~ordinary, torch.tensor([2 * number, 2 * number + 1]), split, 0)
        )
    rows = {split: moments.tokens(split) for split in ("train", "validation", "test")}
    return Accumulated(moments, {"name": "planted"}, {}, rows, {}, {}, {}, {})


def test_a_planted_map_is_found():
    mix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    result = fit(planted(mix, 1e-3, documents=240))[0]
    assert result.r2["variance_weighted"] > 0.9999
    torch.testing.assert_close(result.operator.weight, mix, atol=5e-3, rtol=0)
    assert abs(result.baselines["shuffled"]["variance_weighted"]) <= 0.01


def test_the_identity_is_credited_to_the_identity():
    result = fit(planted(torch.eye(WIDTH, dtype=torch.float64), 0.1))[0]
    assert result.baselines["identity"]["variance_weighted"] > 0.9
    assert abs(result.skill_over_identity["variance_weighted"]) < 0.02


def test_independent_residuals_are_not_predicted():
    result = fit(planted(torch.zeros(WIDTH, WIDTH, dtype=torch.float64), 1.0))[0]
    for metric in METRICS:
        assert abs(result.r2[metric]) <= 0.01
        assert abs(result.baselines["shuffled"][metric]) <= 0.01


def test_one_huge_token_a_sequence_fakes_r2_only_when_asked_for():
    """METHODS acceptance 26: a constant token of norm 1e4, instead of 1, a sequence; independent residuals otherwise."""
    zero = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    plain = fit(planted(zero, 1.0, outlier=1.0))[0]
    with_outlier = fit(planted(zero, 1.0, outlier=1e4 / WIDTH**0.5))[0]
    assert abs(with_outlier.r2["variance_weighted"] - plain.r2["variance_weighted"]) < 1e-3
    assert with_outlier.r2["variance_weighted"] <= 0.02
    assert with_outlier.r2_all_tokens["variance_weighted"] > 0.99


def test_operators_carry_their_origin(accumulated, tmp_path):
    result = fit(accumulated, [(0, 2)])[0]
    file = operator_file(tmp_path, result.operator.pair)
    assert file.name == "0-2.safetensors"
    details = TransportOperator.load(result.operator.save(file)).details
    assert details["model"] == accumulated.model
    assert details["text"] == accumulated.text
    assert details["training_tokens"] == accumulated.tokens["train"]
    assert details["provenance"]["nnato"]
    assert (details["kappa"], details["selection_metric"], details["tokens"]) == (result.kappa, "variance_weighted", "ordinary")


def test_splits_with_too_few_tokens_are_refused(accumulated):
    for n, message in (
        (1, "the validation split holds 1 ordinary token: accumulate more text"),
        (0, "no ordinary tokens in the validation"),
    ):
        accumulated.moments._open["validation.ordinary.0"].n = n
        with pytest.raises(MomentsError, match=message):
            fit(accumulated)


def test_targets_that_do_not_vary_are_refused(accumulated):
    for fold in accumulated.moments.folds("test"):
        part = accumulated.moments._open[f"test.ordinary.{fold}"]
        part.scatter.zero_()
        part.mean.zero_()
    with pytest.raises(MomentsError, match="the held-out residuals of the target do not vary"):
        fit(accumulated)


def test_progress_counts_pairs(accumulated):
    told = []
    fit(accumulated, progress=lambda *step: told.append(step))
    assert told == [("fitting operators", done, 3) for done in (0, 2, 3)]


def test_bad_requests_are_refused(accumulated):
    with pytest.raises(MomentsError, match="unknown metric 'r2'"):
        fit(accumulated, metric="r2")
    with pytest.raises(MomentsError, match="do not hold the pair 1:2; they hold 0:2, 0:3, 1:3"):
        fit(accumulated, [(1, 2)])
    with pytest.raises(SiteError, match="the source must come before the target"):
        fit(accumulated, [(2, 2)])
    with pytest.raises(MomentsError, match="give positive numbers"):
        fit(accumulated, kappas=(0.0,))
    with pytest.raises(MomentsError, match="use 'ordinary' or 'all'"):
        fit(accumulated, tokens="some")


def test_batches_of_one_block_have_no_shuffled_baseline(model, corpus):
    result = accumulate(model, Corpus(corpus.source, context=32, per_document=None), [(0, 2)], batch_size=1)
    assert result.moments.shuffled.n == 0  # batches of one block have no partner
    assert "shuffled" not in fit(result)[0].baselines


def test_every_baseline_is_there_and_judged_on_test(model, corpus, accumulated):
    data = materialise(model, corpus, "ordinary")
    result = fit(accumulated, [(0, 2)])[0]
    assert tuple(result.baselines) == BASELINES
    (x, y), (train_x, train_y) = ((data[split][0], data[split][2]) for split in ("test", "train"))
    cx, cy = train_x - train_x.mean(0), train_y - train_y.mean(0)
    scaled = train_y.mean(0) + (cx * cy).sum() / (cx**2).sum() * (x - train_x.mean(0))
    assert result.baselines["identity_scaled"]["uniform"] == pytest.approx(r2_score(y, scaled), abs=1e-9)
    assert result.baselines["random_orthogonal"]["uniform"] < result.baselines["identity_shift"]["uniform"]
    assert result.baselines["shuffled"]["variance_weighted"] < result.r2["variance_weighted"]
    unit = (cx**2).sum() / WIDTH
    held = data["validation"]
    fits = [Ridge(alpha=kappa * unit, solver="svd").fit(train_x, train_y - train_x) for kappa in KAPPAS]
    scores = [r2_score(held[2], held[0] + one.predict(held[0]), multioutput="variance_weighted") for one in fits]
    best = fits[int(np.argmax(scores))]
    assert result.baselines["shrunk_to_identity"]["uniform"] == pytest.approx(r2_score(y, x + best.predict(x)), abs=1e-8)


def test_intervals_are_those_of_folds_of_test_documents(accumulated):
    result = fit(accumulated, [(1, 3)])[0]
    moments, operator = accumulated.moments, result.operator
    errors, totals, shifted = [], [], []
    mean = moments.of("test").mean_of(T)
    for fold in moments.folds("test"):
        rows = Regression.of(moments.of("test", folds=[fold]), (S, T))
        for kept, weight, bias in (
            (errors, operator.weight, operator.bias),
            (shifted, torch.eye(WIDTH, dtype=torch.float64), operator.target_mean - operator.source_mean),
        ):
            residual = rows.y_mean - rows.x_mean @ weight - bias
            cross = weight.T @ rows.xy
            kept.append((rows.yy - cross - cross.T + weight.T @ rows.xx @ weight).trace() + rows.n * residual @ residual)
        totals.append(rows.yy.trace() + rows.n * (rows.y_mean - mean) @ (rows.y_mean - mean))
    want = share_explained(torch.stack(errors), torch.stack(totals))
    got = result.r2_intervals["variance_weighted"]
    assert (got.value, got.low, got.high) == pytest.approx((want.value, want.low, want.high), abs=1e-10)
    assert got.value == result.r2["variance_weighted"]
    skill = share_explained(torch.stack(errors), torch.stack(shifted))
    assert result.skill_intervals["variance_weighted"].high == pytest.approx(skill.high, abs=1e-10)
    assert got.low < got.value < got.high
    record = result.to_json()["r2"]["variance_weighted"]
    assert (record["low"], record["high"]) == (got.low, got.high)
    assert np.isnan(fit(accumulated, [(1, 3)], tokens="all")[0].r2_intervals["uniform"].low)


def test_the_papers_method_on_folds_of_documents(accumulated):
    result = fit(accumulated, [(0, 2)], method=Method.paper())[0]
    assert result.alpha in PAPER_ALPHAS
    assert result.to_json()["select"] == "kfold"
    with pytest.raises(MomentsError, match="folds are kept of these only"):
        fit(accumulated, method=Method.paper(), tokens="all")
    with pytest.raises(MomentsError, match="as part of the method, or no method"):
        fit(accumulated, method=Method.paper(), metric="uniform")


@pytest.mark.parametrize(
    "method",
    [
        Method(select="kfold"),
        Method(select="gcv", standardize=True),
        Method(penalty="lasso"),
        Method(penalty="elastic-net", standardize=True),
        Method(shrink_to="identity", rank=5),
    ],
)
def test_every_method_predicts(accumulated, method):
    plain = fit(accumulated, [(1, 3)])[0]
    result = fit(accumulated, [(1, 3)], method=method)[0]
    assert abs(result.r2["variance_weighted"] - plain.r2["variance_weighted"]) < 0.25
    record = result.to_json()
    assert record["penalty"] == method.penalty
    assert record["rank"] == (method.rank or WIDTH)
    assert record["converged"]
    assert result.operator.details["standardize"] == method.standardize


def test_compositions_are_compared_with_the_direct_operator(model, corpus):
    moments = accumulate(model, corpus, [(0, 1), (1, 3), (0, 3)])
    fits = {result.operator.pair: result for result in fit(moments, compositions=True)}
    data = materialise(model, corpus, "ordinary")["test"]
    composed = fits[0, 3].composed
    assert list(composed) == [1]
    predicted = fits[1, 3].operator(fits[0, 1].operator(torch.from_numpy(data[0]))).numpy()
    assert composed[1]["uniform"] == pytest.approx(r2_score(data[3], predicted), abs=1e-9)
    assert fits[0, 3].to_json()["composed"] == [{"through": 1, "r2": composed[1]}]
    assert fits[0, 1].composed == {}
