"""R² against tokens from merged folds: the same as refits on the rows of these folds (METHODS acceptance 24)."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from test_efficiency import PAIR, rows_of

from nnato.accumulation import accumulate
from nnato.corpus import Corpus
from nnato.errors import MomentsError
from nnato.ridge import KAPPAS
from nnato.scaling import scale, scaling_study
from nnato.selection import Method


def test_points_equal_refits_on_the_rows_of_the_first_folds():
    rows, parts = rows_of(np.random.default_rng(0), (60, 40, 40), folds=4)
    got = scale(PAIR, rows, Method(metric="uniform"))
    (held_x, held_y), (test_x, test_y) = (tuple(part.reshape(-1, 8) for part in parts[one]) for one in (1, 2))
    assert [point.folds for point in got.points] == [1, 2, 3, 4]
    for point in got.points:
        chosen = np.concatenate([np.arange(60)[fold::4] for fold in range(point.folds)])
        x, y = (part[chosen].reshape(-1, 8) for part in parts[0])
        assert point.tokens == len(x)
        unit = ((x - x.mean(0)) ** 2).sum() / 8
        fits = [Ridge(alpha=kappa * unit, solver="svd").fit(x, y) for kappa in KAPPAS]
        best = int(np.argmax([r2_score(held_y, one.predict(held_x)) for one in fits]))
        assert point.kappa == KAPPAS[best]
        fitted = fits[best]
        assert point.r2["uniform"].value == pytest.approx(r2_score(test_y, fitted.predict(test_x)), abs=1e-9)
        assert point.r2["uniform"].low < point.r2["uniform"].value < point.r2["uniform"].high
    half, whole = got.points[1], got.points[3]
    want = (whole.r2["whitened"].value - half.r2["whitened"].value) / math.log2(whole.tokens / half.tokens)
    assert got.per_doubling("whitened") == pytest.approx(want)
    record = got.to_json()
    assert record["points"][3]["tokens"] == 1200
    assert set(record["r2_per_doubling"]) == {"variance_weighted", "uniform", "whitened"}


def test_scaling_of_a_model(model, corpus):
    moments = accumulate(model, corpus, [(0, 3), (1, 3)])
    told = []
    results = scaling_study(moments, [(1, 3)], method=Method(select="gcv"), progress=lambda *step: told.append(step))
    assert [result.pair for result in results] == [(1, 3)]
    assert results[0].points[-1].tokens == moments.tokens["train"]
    assert told[-1] == ("fitting operators", 1, 1)
    with pytest.raises(MomentsError, match="on validation documents or by gcv"):
        scaling_study(moments, method=Method(select="kfold"))
    with pytest.raises(MomentsError, match="at least two folds of training documents"):
        scaling_study(accumulate(model, Corpus(corpus.source, context=32, per_document=None, folds=1), [(0, 3)]))
