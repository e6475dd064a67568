"""Files written by each schema so far still load, with the numbers they were written with; `stored/` keeps them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nnato.accumulation import load_moments
from nnato.errors import FileFormatError
from nnato.operators import TransportOperator
from nnato.storage import SCHEMA, write_artifact

STORED = Path(__file__).with_name("stored")


def test_every_schema_has_files():
    assert sorted(path.name for path in STORED.iterdir()) == [f"schema_{number}" for number in range(1, SCHEMA + 1)]


@pytest.mark.parametrize("number", range(1, SCHEMA + 1))
def test_operators_load(number):
    operator = TransportOperator.load(STORED / f"schema_{number}" / "operator.safetensors")
    assert (operator.source, operator.target, operator.name, operator.details) == (0, 1, "transport", {"alpha": 0.5})
    # (x - 1) W + 2, with W the numbers 0 to 8 in tenths
    want = torch.tensor([2 + 0.0 * 1 + 0.3 * 2 + 0.6 * 3, 2 + 0.1 * 1 + 0.4 * 2 + 0.7 * 3, 2 + 0.2 * 1 + 0.5 * 2 + 0.8 * 3])
    torch.testing.assert_close(operator(torch.tensor([2.0, 3.0, 4.0])), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("number", range(1, SCHEMA + 1))
def test_moments_load(number):
    folder = STORED / f"schema_{number}"
    moments = load_moments(folder / "moments").moments
    for split, want in json.loads((folder / "expected.json").read_text()).items():
        found = moments.of(split)
        assert found.n == want["rows"]
        torch.testing.assert_close(found.scatter_of(0, 1), torch.tensor(want["cross"], dtype=torch.float64), atol=1e-12, rtol=0)
        torch.testing.assert_close(found.mean_of(1, as_target=True), torch.tensor(want["mean"], dtype=torch.float64), atol=1e-12, rtol=0)


def test_newer_schemas_say_what_to_do(tmp_path):
    write_artifact(tmp_path / "o.safetensors", "operator", {}, {})
    data = (tmp_path / "o.safetensors").read_bytes().replace(b'\\"schema\\": %d' % SCHEMA, b'\\"schema\\": 9', 1)
    (tmp_path / "o.safetensors").write_bytes(data)
    with pytest.raises(FileFormatError, match=f"has schema 9, this nnato reads up to {SCHEMA}; upgrade nnato"):
        TransportOperator.load(tmp_path / "o.safetensors")
