from __future__ import annotations

import pytest
import torch

from nnato.errors import FileFormatError, OperatorError, SiteError
from nnato.operators import KIND, TransportOperator, baselines, compose, constant
from nnato.sites import ResidualSite
from nnato.storage import write_artifact

PAIR = ResidualSite(1), ResidualSite(3)


@pytest.fixture
def operator():
    generator = torch.Generator().manual_seed(0)
    weight, x, y = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((4, 4), (4,), (4,)))
    return TransportOperator(*PAIR, weight, x, y, details={"alpha": 3.0})


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_prediction_is_affine_in_any_dtype(operator, dtype, atol):
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = operator(x)
    assert got.dtype == dtype
    want = x.double() @ operator.weight + operator.bias
    torch.testing.assert_close(got.double(), want, atol=atol, rtol=atol)


def test_centring_keeps_digits_that_a_large_mean_would_cost(operator):
    mean = torch.full((4,), 2.0**20, dtype=torch.float64)
    shifted = TransportOperator(*PAIR, operator.weight, mean, operator.target_mean)
    x = (torch.randn(100, 4, generator=torch.Generator().manual_seed(1)) + 2.0**20).float()
    exact = (x.double() - mean) @ operator.weight + operator.target_mean
    torch.testing.assert_close(shifted(x).double(), exact, atol=1e-5, rtol=0)
    uncentred = x @ operator.weight.float() + shifted.bias.float()
    assert float((uncentred - exact).abs().max()) > 0.01


def test_save_and_load(operator, tmp_path):
    loaded = TransportOperator.load(operator.save(tmp_path / "1-3.safetensors"))
    for name in ("weight", "source_mean", "target_mean"):
        assert torch.equal(getattr(loaded, name), getattr(operator, name))
    assert (loaded.pair, loaded.name, loaded.details) == (PAIR, "transport", {"alpha": 3.0})


def test_an_operator_from_embed(operator, tmp_path):
    one = TransportOperator(ResidualSite.EMBED, PAIR[1], operator.weight, operator.source_mean, operator.target_mean)
    assert TransportOperator.load(one.save(tmp_path / "o.safetensors")).source == ResidualSite.EMBED


def test_baselines():
    x, y = torch.arange(4.0, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    found = baselines(PAIR, x, y)
    row = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(found["mean"](row), y.expand(3, 4))
    torch.testing.assert_close(found["identity"](row), row, rtol=0, atol=0)
    torch.testing.assert_close(found["identity_shift"](row), row + y - x)
    assert {name: operator.name for name, operator in found.items()} == {name: name for name in found}
    torch.testing.assert_close(constant(PAIR, y, "zero").bias, y)


def test_baselines_can_be_saved_too(operator, tmp_path):
    for name, one in baselines(PAIR, operator.source_mean, operator.target_mean).items():
        assert TransportOperator.load(one.save(tmp_path / name)).name == name


def test_other_widths_are_refused(operator):
    with pytest.raises(OperatorError, match="this operator takes residuals of width 4, not 5"):
        operator(torch.zeros(2, 5))


def test_operators_must_go_forward_and_fit_together(operator):
    with pytest.raises(SiteError, match="the source must come before the target"):
        TransportOperator(PAIR[1], PAIR[0], operator.weight, operator.source_mean, operator.target_mean)
    with pytest.raises(OperatorError, match=r"have shapes \[\(4, 4\), \(3,\), \(4,\)\]"):
        TransportOperator(*PAIR, operator.weight, operator.source_mean[:3], operator.target_mean)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"weight": None}, {}, "it holds the tensors"),
        ({"weight": torch.zeros(4, 4)}, {}, "weight is not float64"),
        ({"weight": torch.full((4, 4), float("nan"), dtype=torch.float64)}, {}, "weight holds values that are not finite"),
        ({"weight": torch.zeros(4, 3, dtype=torch.float64)}, {}, r"have shapes"),
        ({}, {"source": 5}, "the source must come before the target"),
        ({}, {"source": -7}, "is not a residual site"),
        ({}, {"source": [1]}, "is not a residual site"),
        ({}, {"details": None}, "details is missing"),
        ({}, {"details": [1]}, "details is not a dict"),
    ],
)
def test_files_that_are_no_operator_are_refused(operator, tmp_path, tensors, metadata, message):
    contents = {name: getattr(operator, name) for name in ("weight", "source_mean", "target_mean")} | tensors
    header = {"source": 1, "target": 3, "name": "transport", "details": {}} | metadata
    path = tmp_path / "o.safetensors"
    kept = {name: value for name, value in contents.items() if value is not None}
    write_artifact(path, KIND, kept, {name: value for name, value in header.items() if value is not None})
    with pytest.raises(FileFormatError, match=f"is inconsistent: .*{message}.*; make it again"):
        TransportOperator.load(path)


def test_a_composition_is_one_map_after_the_other(operator):
    generator = torch.Generator().manual_seed(2)
    weight, x, y = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((4, 4), (4,), (4,)))
    second = TransportOperator(ResidualSite(3), ResidualSite(6), weight, x, y)
    residual = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    both = compose(operator, second)
    torch.testing.assert_close(both(residual), second(operator(residual)), atol=1e-12, rtol=0)
    assert (both.source, both.target, both.name, both.details) == (1, 6, "composed", {"through": 3})
    with pytest.raises(OperatorError, match="operators 3:6 and 1:3 cannot be composed: the first has to end where the second begins"):
        compose(second, operator)
