"""Sweeps over sizes: a row for each, resumed, and their numbers against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import BLOCKS, WIDTH
from test_layer_stats import of

from nnato.errors import DictionaryError
from nnato.layer_stats import LayerStats
from nnato.models import describe
from nnato.multilayer import load_layer_activity, load_multilayer
from nnato.sae_training import Recipe
from nnato.sweep import deviations, sweep

RECIPE = Recipe(tokens=400, rows=64, buffer=256)


def test_deviations_are_those_of_numpy():
    stats, dense = of(0, 1, layers=(1, 5, 6, 11))
    stats.total[3] = 0
    totals = dense.sum(1).T
    wanted = []
    for f in range(len(totals)):
        if f != 3:
            p = totals[f] / totals[f].sum()
            wanted.append(math.sqrt(p @ (np.array([1, 5, 6, 11]) - p @ np.array([1, 5, 6, 11])) ** 2))
    found = deviations(stats)
    for name, values in (("std", np.array(wanted)), ("rel", np.array(wanted) / 11)):
        numbers = [values.mean(), values.var(ddof=1), values.std(ddof=1), values.std(ddof=1) / math.sqrt(len(values))]
        np.testing.assert_allclose([found[f"{name}_{what}"] for what in ("mean", "var", "std", "sem")], numbers, rtol=1e-9)


def test_deviations_of_too_few_latents():
    assert all(math.isnan(value) for value in deviations(LayerStats((0, 1), 4)).values())
    one = LayerStats((0, 1), 4)
    one.total[2] = torch.tensor([1.0, 1.0])
    assert deviations(one)["std_mean"] == 0.5
    assert math.isnan(deviations(one)["std_sem"])


def test_a_row_for_each_size_and_resumption(model, corpus, tmp_path):
    first = next(sweep(model, (1, 2), (2, 4), RECIPE, out=tmp_path, corpus=corpus))  # and then it is killed
    weights = (tmp_path / "x1-k2" / "checkpoint.safetensors").read_bytes()
    rows = list(sweep(model, (1, 2), (2, 4), RECIPE, out=tmp_path, corpus=corpus))
    assert (tmp_path / "x1-k2" / "checkpoint.safetensors").read_bytes() == weights
    assert rows[0] == first
    assert [(row["expansion"], row["k"]) for row in rows] == [(1, 2), (1, 4), (2, 2), (2, 4)]
    assert [row["latents"] for row in rows] == [WIDTH, WIDTH, 2 * WIDTH, 2 * WIDTH]
    for row in rows:
        sae = load_multilayer(row["path"], describe(model))
        activity = load_layer_activity(row["path"], sae)
        assert sae.dictionary.k == row["k"]
        assert len(sae.sites) == BLOCKS
        assert row["tokens"] == activity.stats.tokens > 0
        assert row["l0"] <= row["k"]
        assert row["fvu"] == pytest.approx(np.mean([one["fvu"].value for one in activity.metrics()]))
        assert row["rel_mean"] == pytest.approx(row["std_mean"] / BLOCKS)
        assert row["dead"] == pytest.approx(np.mean(activity.stats.total.sum(1).numpy() == 0))


def test_sizes_that_are_none_are_refused_before_the_first_training(model, corpus, tmp_path):
    with pytest.raises(DictionaryError, match="more than 16 latents: leave it out, or expansion 1"):
        next(sweep(model, (1, 2), (2, 17), RECIPE, out=tmp_path / "out", corpus=corpus))
    with pytest.raises(DictionaryError, match="at least one expansion"):
        next(sweep(model, (), (2,), RECIPE, out=tmp_path / "out", corpus=corpus))
    assert not (tmp_path / "out").exists()
