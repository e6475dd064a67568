"""Every kind of interval and p-value in simulations: the table of docs/reliability.md, within what 200 runs can tell."""

from __future__ import annotations

import pytest
from calibration import SIMULATIONS


@pytest.mark.slow
@pytest.mark.parametrize("simulation", SIMULATIONS, ids=lambda one: one.__name__)
def test_intervals_hold_the_truth_and_p_values_call_little_by_chance(simulation):
    for name, share in simulation().items():
        if "null" in name:
            assert share <= 0.05 + 2 * (0.05 * 0.95 / 200) ** 0.5, name
        else:
            assert share >= 0.91, name
