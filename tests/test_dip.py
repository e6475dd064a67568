"""The dip against linear programs over all distributions of one peak."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from nnato import dip as dip_module
from nnato.dip import dip


def by_program(weights):
    """min t such that some weights that rise and fall, with room outside, have a distribution function within t."""
    wanted = np.concatenate([[0], np.cumsum(weights) / np.sum(weights)])
    edges, best = len(wanted), np.inf
    for peak in range(edges):
        # Unknown: G at the edges and once more at the peak, from the right, and t.
        rows, bounds = [], []

        def at_most(bound, rows=rows, bounds=bounds, **entries):
            row = np.zeros(edges + 2)
            for name, value in entries.items():
                row[int(name[1:])] += value
            rows.append(row)
            bounds.append(bound)

        left, right = list(range(peak + 1)), [edges, *range(peak + 1, edges)]
        for number in range(edges + 1):
            at = wanted[peak if number == edges else number]
            at_most(at, **{f"g{number}": 1, f"t{edges + 1}": -1})
            at_most(-at, **{f"g{number}": -1, f"t{edges + 1}": -1})
        for side, sign in ((left, 1), (right, -1)):
            for a, b, c in zip(side, side[1:], side[2:], strict=False):
                at_most(0, **{f"g{a}": -sign, f"g{b}": 2 * sign, f"g{c}": -sign})
        whole = [*left, *right]
        for a, b in itertools.pairwise(whole):
            at_most(0, **{f"g{a}": 1, f"g{b}": -1})
        cost = np.zeros(edges + 2)
        cost[-1] = 1
        exact = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
        room = [(0, 1)] * (edges + 1) + [(0, None)]
        found = linprog(cost, np.array(rows), bounds, bounds=room, method="highs", options=exact)
        assert found.status == 0
        best = min(best, found.fun)
    return best


def some_weights(bins, count, seed=0):
    generator = np.random.default_rng(seed)
    dense = generator.random((count, bins)) ** 4
    sparse = dense * (generator.random((count, bins)) < 0.4)
    sparse[sparse.sum(1) == 0, 0] = 1
    return np.concatenate([dense, sparse])


@pytest.mark.parametrize("bins", [1, 2, 3, 4, 7, 12])
def test_equals_linear_programs(bins):
    weights = some_weights(bins, 12, bins)
    np.testing.assert_allclose(dip(torch.tensor(weights)).numpy(), [by_program(row) for row in weights], rtol=0, atol=1e-9)


def test_one_peak_has_no_dip():
    single = torch.eye(6)
    neighbours = single[:-1] + single[1:]
    slope = torch.tensor([[1.0, 2, 5, 4, 4, 0], [1, 1, 1, 1, 1, 1], [0, 1, 2, 3, 4, 9]])
    assert float(dip(torch.cat([single, neighbours, slope])).max()) < 1e-12


def test_two_peaks():
    """Halves at both ends of a row: one peak can be met up to a quarter less half of what one bin of a flat row holds."""
    for bins in (3, 10, 50):
        weights = torch.zeros(1, bins)
        weights[0, [0, -1]] = 1.0
        assert float(dip(weights)) == pytest.approx(by_program(weights[0].numpy()), abs=1e-9)
        assert float(dip(weights)) < 0.25
    near, far = torch.tensor([[1.0, 0, 1, 0, 0, 0]]), torch.tensor([[1.0, 0, 0, 0, 0, 1]])
    assert 0 < float(dip(near)) < float(dip(far))


def test_scale_mirror_and_portions(monkeypatch):
    weights = torch.tensor(some_weights(8, 10))
    whole = dip(weights)
    torch.testing.assert_close(dip(1e6 * weights), whole, atol=1e-12, rtol=0)
    torch.testing.assert_close(dip(weights.flip(1)), whole, atol=1e-12, rtol=0)
    monkeypatch.setattr(dip_module, "CELLS", 1)
    assert torch.equal(dip(weights), whole)


def test_nothing_and_none():
    assert dip(torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 1.0]])).isnan().tolist() == [True, False]
    assert dip(torch.zeros(0, 4)).shape == (0,)
