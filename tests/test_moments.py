"""Moments against two-pass numpy and 50-digit references; algebra; refusals that change nothing."""

from __future__ import annotations

import subprocess
import sys

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnato.errors import ActivationError, MomentsError
from nnato.moments import Moments
from nnato.sites import ResidualSite
from nnato.statistics import NonFinite, ResidualBatch
from nnato.transport_moments import TransportMoments

SITES = tuple(map(ResidualSite, (0, 2, 5)))
PAIRS = ((SITES[0], SITES[1]), (SITES[0], SITES[2]), (SITES[1], SITES[2]))
D = 6


def rows(n, seed=0, mean=0.0, d=D):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(SITES), n, d, generator=generator, dtype=torch.float64) + mean


def moments_of(x):
    moments = Moments.of_pairs(PAIRS, x.shape[2])
    moments.update(x)
    return moments


def assert_close(a, b, rtol=1e-12):
    assert a.n == b.n
    for block in b.blocks:
        one, other = a.scatter_of(*block), b.scatter_of(*block)
        assert float((one - other).abs().max()) <= rtol * max(float(other.abs().max()), 1e-300)
    assert float((a.mean - b.mean).abs().max()) <= rtol * max(float(b.mean.abs().max()), 1e-300)


def reference(x, site, other):
    a, b = (x[SITES.index(s)].numpy().astype(np.longdouble) for s in (site, other))
    return (a - a.mean(0)).T @ (b - b.mean(0))


@pytest.mark.parametrize("mean", [0.0, 3000.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_chunks_equal_a_two_pass_reference(mean, dtype):
    x = rows(500, mean=mean).to(dtype)
    moments = Moments.of_pairs(PAIRS, D)
    for chunk in x.split([1, 99, 0, 200, 7, 193], dim=1):
        moments.update(chunk)
    x = x.double()
    for s in SITES:
        for t in SITES:
            want = reference(x, s, t)
            got = moments.scatter_of(s, t).numpy()
            assert np.abs(got - want).max() <= 1e-12 * np.abs(reference(x, s, s)).max()
        assert np.abs(moments.mean_of(s).numpy() - x[SITES.index(s)].numpy().mean(0)).max() <= 1e-12 * max(mean, 1)


@pytest.mark.parametrize("mean", [0.0, 3000.0])
def test_products_in_float32_cost_seven_digits(mean):
    """Relative to the standard deviations of both coordinates, whatever the mean; under autocast too."""
    scales = torch.logspace(0, -3, D, dtype=torch.float64)
    x = rows(4000) * scales + mean
    exact, fast = moments_of(x), Moments.of_pairs(PAIRS, D, products=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for chunk in x.split(500, dim=1):
            fast.update(chunk)
    assert fast.scatter.dtype == torch.float64
    deviations = torch.stack([exact.scatter_of(s, s).diagonal().sqrt() for s in SITES])
    for s in SITES:
        for t in SITES:
            unit = torch.outer(deviations[SITES.index(s)], deviations[SITES.index(t)])
            error = ((fast.scatter_of(s, t) - exact.scatter_of(s, t)) / unit).abs().max()
            assert 1e-12 < float(error) <= 1e-6
    assert float((fast.mean - exact.mean).abs().max()) <= 1e-12 * max(mean, 1)


def test_fifty_digits():
    x = rows(40, mean=1e6, d=2)
    got = moments_of(x)
    with mpmath.workdps(50):
        for s in range(3):
            column = [mpmath.mpf(float(value)) for value in x[s, :, 0]]
            average = mpmath.fsum(column) / len(column)
            exact = mpmath.fsum((value - average) ** 2 for value in column)
            assert abs(float(got.scatter_of(SITES[s], SITES[s])[0, 0]) / float(exact) - 1) <= 1e-9  # the mean costs 6 of 16 digits
    shifted = moments_of(x - 1e6)
    assert_close(moments_of(rows(40, d=2)), shifted, rtol=1e-9)


def test_ambient_dtype_and_autocast_do_not_matter():
    x = rows(64).float()
    want = moments_of(x)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = moments_of(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.scatter.dtype == torch.float64
    assert torch.equal(got.scatter, want.scatter)
    assert torch.equal(got.mean, want.mean)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.randoms(use_true_random=False), st.sampled_from([0.0, 100.0]))
def test_merging_chunks_in_any_order_is_one_update(sizes, random, mean):
    x = rows(sum(sizes), seed=sum(sizes), mean=mean)
    parts = [moments_of(chunk) for chunk in x.split(sizes, dim=1)]
    random.shuffle(parts)
    merged = Moments.of_pairs(PAIRS, D)
    for part in parts:
        merged = merged.merge(part)
    if sum(sizes):
        assert_close(merged, moments_of(x))
    else:
        assert merged.n == 0


def test_subtract_inverts_merge():
    a, b = moments_of(rows(100, mean=3.0)), moments_of(rows(30, seed=1))
    assert_close(a.merge(b).subtract(b), a)
    assert a.subtract(a).n == 0


def test_merge_with_empty_is_a_copy():
    a, empty = moments_of(rows(10)), Moments.of_pairs(PAIRS, D)
    for merged in (a.merge(empty), empty.merge(a)):
        assert torch.equal(merged.scatter, a.scatter)
        assert torch.equal(merged.mean, a.mean)
        assert merged.scatter.data_ptr() != a.scatter.data_ptr()


def test_own_blocks_are_symmetric_and_positive_semidefinite():
    own = moments_of(rows(4)).scatter_of(SITES[0], SITES[0])  # fewer rows than dimensions
    assert torch.equal(own, own.T)
    assert float(torch.linalg.eigvalsh(own)[0]) >= -torch.finfo(torch.float64).eps * D * float(torch.linalg.matrix_norm(own))


def test_reversed_pairs_are_transposed_and_reading_changes_nothing():
    moments = moments_of(rows(20))
    before = moments.scatter.clone(), moments.mean.clone()
    assert torch.equal(moments.scatter_of(SITES[2], SITES[0]), moments.scatter_of(SITES[0], SITES[2]).T)
    assert torch.equal(moments.scatter, before[0])
    assert torch.equal(moments.mean, before[1])


def test_shuffled_targets_have_their_own_mean():
    x, y = rows(50), rows(50, seed=1, mean=5.0)
    moments = Moments(PAIRS, D)
    for start in (0, 20):
        stop = 20 if start == 0 else 50
        moments.update(x[:, start:stop], y[:, start:stop])
    want = (x[0] - x[0].mean(0)).T @ (y[1] - y[1].mean(0))
    torch.testing.assert_close(moments.scatter_of(SITES[0], SITES[1]), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments.mean_of(SITES[1], as_target=True), y[1].mean(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused_and_change_nothing(value):
    moments = moments_of(rows(20))
    before = moments.scatter.clone(), moments.mean.clone(), moments.n
    bad = rows(5, seed=3)
    bad[1, 4, 2] = value
    with pytest.raises(ActivationError, match=f"rows: site 2, row 4: the value is {value}"):
        moments.update(bad)
    assert torch.equal(moments.scatter, before[0])
    assert torch.equal(moments.mean, before[1])
    assert moments.n == before[2]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(3, 5, D + 1), r"shape \(3, 5, 7\), not \(3 sites, n, d_model 6\)"),
        (torch.zeros(2, 5, D), r"shape \(2, 5, 6\)"),
        (torch.zeros(3 * D), r"shape \(18,\)"),
        (torch.zeros(3, 5, D, dtype=torch.int64), "dtype torch.int64, not a floating-point one"),
    ],
)
def test_wrong_rows_are_refused(bad, message):
    with pytest.raises(ActivationError, match=message):
        Moments.of_pairs(PAIRS, D).update(bad)


def test_targets_of_another_length_are_refused():
    with pytest.raises(ActivationError, match="targets have shape"):
        Moments.of_pairs(PAIRS, D).update(rows(5), rows(6))


def test_unlike_moments_are_refused():
    with pytest.raises(MomentsError, match="at width 6 and of 0:2, 0:5, 2:5 at width 7 do not fit together"):
        moments_of(rows(5)).merge(Moments.of_pairs(PAIRS, 7))
    with pytest.raises(MomentsError, match="cannot subtract 6 rows from 5"):
        moments_of(rows(5)).subtract(moments_of(rows(6)))


def test_missing_sites_and_pairs_are_named():
    moments = moments_of(rows(5))
    with pytest.raises(MomentsError, match="do not hold site 3; they hold 0, 2, 5"):
        moments.mean_of(3)
    with pytest.raises(MomentsError, match="do not hold the pair 0:3; they hold 0:2, 0:5, 2:5"):
        moments.scatter_of(0, 3)


def test_an_interrupted_update_is_not_read_as_whole():
    moments = moments_of(rows(5))

    class Interrupting(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.Tensor.addmm_ or getattr(function, "__name__", "") == "addmm_":
                raise KeyboardInterrupt
            return super().__torch_function__(function, types, args, kwargs or {})

    moments.scatter = moments.scatter.as_subclass(Interrupting)
    with pytest.raises(KeyboardInterrupt):
        moments.update(rows(5))
    with pytest.raises(MomentsError, match="interrupted in the middle of an update: load the last checkpoint"):
        moments.mean_of(0)


@pytest.mark.parametrize("width", [1, 127, 128, 129, 300])
def test_symmetric_products_in_panels_equal_whole_ones(width):
    """Widths around and above a panel, two batches with a large mean, against numpy."""
    generator = torch.Generator().manual_seed(width)
    data = torch.randn(2, 90, width, generator=generator, dtype=torch.float64) + 50
    moments = Moments.of_pairs([(SITES[0], SITES[2])], width)
    moments.update(data[:, :40])
    moments.update(data[:, 40:])
    for place, site in enumerate((SITES[0], SITES[2])):
        rows = data[place].numpy()
        want = (rows - rows.mean(0)).T @ (rows - rows.mean(0))
        got = moments.scatter_of(site, site).numpy()
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-10 * np.abs(want).max())
        assert np.array_equal(got, got.T)
    half = Moments.of_pairs([(SITES[0], SITES[2])], width)
    half.update(data[:, :40])
    other = Moments.of_pairs([(SITES[0], SITES[2])], width)
    other.update(data[:, 40:])
    assert_close(half.merge(other), moments)
    assert_close(moments.subtract(half), other, 1e-9)


# ---- TransportMoments --------------------------------------------------------------------------------------------------


def batch(seed=0, split="train", documents=(1, 2, 3), length=10, fold=0):
    generator = torch.Generator().manual_seed(seed)
    residuals = torch.randn(len(SITES), len(documents), length, D, generator=generator)
    ordinary = torch.ones(len(documents), length, dtype=torch.bool)
    ordinary[:, 0] = False
    excluded = ~ordinary
    ordinary[0, -1] = False  # padding: in neither class
    return ResidualBatch(residuals, SITES, ordinary, excluded, torch.tensor(documents), split, fold)


def test_classes_and_splits_are_kept_apart():
    moments = TransportMoments(PAIRS, D)
    train, test = batch(), batch(seed=1, split="test")
    moments.update(train)
    moments.update(test)
    for split, one in (("train", train), ("test", test)):
        x = one.residuals.double()
        assert_close(moments.of(split), moments_of(x[:, one.ordinary]))
        assert_close(moments.of(split, "all"), moments_of(x[:, one.ordinary | one.excluded]))
    with pytest.raises(MomentsError, match="no ordinary tokens in the validation split"):
        moments.of("validation")
    with pytest.raises(MomentsError, match="use 'ordinary' or 'all'"):
        moments.of("train", "some")
    assert moments.of("train", pairs=PAIRS[:1]).sites == SITES[:2]


def test_shuffled_pairs_join_other_documents_at_the_same_position():
    moments = TransportMoments(PAIRS, D)
    one = batch(documents=(1, 1, 2))
    moments.update(one)
    x = one.residuals.double()
    sources, targets = [], []
    for block in range(3):
        other = (block - 1) % 3
        for position in range(10):
            if one.documents[block] != one.documents[other] and one.ordinary[block, position] and one.ordinary[other, position]:
                sources.append(x[0, block, position])
                targets.append(x[2, other, position])
    a, b = torch.stack(sources), torch.stack(targets)
    assert moments.shuffled.n == len(a)
    want = (a - a.mean(0)).T @ (b - b.mean(0))
    torch.testing.assert_close(moments.shuffled.scatter_of(SITES[0], SITES[2]), want, rtol=1e-11, atol=1e-11)


def test_a_refused_batch_changes_nothing_and_names_the_place():
    moments = TransportMoments(PAIRS, D)
    moments.update(batch())
    before = {name: tensor.clone() for name, tensor in moments.state()[0].items()}
    bad = batch(seed=5)
    bad.residuals[1, 2, 0, 3] = float("nan")  # an excluded token: checked before the ordinary ones are added
    with pytest.raises(NonFinite, match="block 2 of the batch, position 0, site 2: the residual is nan"):
        moments.update(bad)
    after = moments.state()[0]
    assert all(torch.equal(after[name], before[name]) for name in before)
    padded = batch(seed=6)
    padded.residuals[1, 0, -1, 3] = float("nan")  # padding may hold anything
    moments.update(padded)


def test_state_restores_bit_for_bit():
    moments = TransportMoments(PAIRS, D)
    moments.update(batch())
    moments.update(batch(seed=1, split="test"))
    tensors, metadata = moments.state()
    again = TransportMoments(PAIRS, D)
    again.restore(tensors, metadata)
    for one in (moments, again):
        one.update(batch(seed=2))
    left, right = moments.state(), again.state()
    assert left[1] == right[1]
    assert all(torch.equal(left[0][name], right[0][name]) for name in left[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m.update(d_model=7), "other pairs or another width"),
        (lambda t, m: m.update(pairs=[[0, 2]]), "other pairs or another width"),
        (lambda t, m: t.pop("shuffled.0.mean"), "lack some of their tensors"),
        (lambda t, m: t.update({"shuffled.0.mean": torch.zeros(1)}), "another shape or dtype"),
        (lambda t, m: t.update({"shuffled.0.mean": t["shuffled.0.mean"].float()}), "another shape or dtype"),
        (lambda t, m: t.update({"shuffled.0.mean": t["shuffled.0.mean"] * float("nan")}), "not finite"),
        (lambda t, m: m["rows"].update({"shuffled.0": -1}), "number of rows of shuffled.0 is -1"),
    ],
)
def test_states_that_do_not_fit_are_refused_and_change_nothing(change, message):
    moments = TransportMoments(PAIRS, D)
    moments.update(batch())
    tensors, metadata = moments.state()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors, metadata)
    before = moments.shuffled.n
    with pytest.raises(MomentsError, match=message):
        moments.restore(tensors, metadata)
    assert moments.shuffled.n == before


REFUSALS = """
import torch
from nnato.errors import ActivationError
from nnato.moments import Moments
from nnato.sites import ResidualSite

pairs = ((ResidualSite(0), ResidualSite(1)),)
moments, good = Moments.of_pairs(pairs, 3), torch.ones(2, 4, 3)
moments.update(good)
before = moments.scatter.clone(), moments.mean.clone(), moments.n
nan, inf = good.clone(), good.clone()
nan[1, 2, 0], inf[0, 3, 1] = float("nan"), float("-inf")
for rows, targets in ((nan, None), (inf, None), (good[..., :2], None), (good.long(), None), (good[:1], None), (good, good[:, :3])):
    try:
        moments.update(rows, targets)
    except ActivationError as error:
        print(error)
    else:
        raise SystemExit("accepted")
    if not (torch.equal(moments.scatter, before[0]) and torch.equal(moments.mean, before[1]) and moments.n == before[2]):
        raise SystemExit("changed")
"""


def test_refusals_do_not_depend_on_assertions():
    """`python -O` removes assertions; bad rows are refused all the same, with their place, and change nothing."""
    run = subprocess.run([sys.executable, "-O", "-c", REFUSALS], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    said = run.stdout.splitlines()
    assert len(said) == 6
    assert said[:2] == ["rows: site 1, row 2: the value is nan", "rows: site 0, row 3: the value is -inf"]
    assert all(word in line for word, line in zip(("shape", "dtype", "shape", "shape"), said[2:], strict=True))
