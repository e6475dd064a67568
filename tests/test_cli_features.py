"""`nnato features` as a user types it."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from test_cli import TEXT, check_envelope, run
from test_dictionaries import LATENTS, make_sae

from nnato import plots
from nnato.accumulation import load_moments
from nnato.dictionaries import load_dictionary
from nnato.features import evaluate_features
from nnato.verdicts import VERDICTS


@pytest.fixture
def folder(saved_model, text, tmp_path):
    run("accumulate", saved_model, "--pairs", "0:3,1:3,0:1", "--text", text, *TEXT, "--out", tmp_path / "moments")
    make_sae("topk", metadata={"hook_name": "blocks.3.hook_resid_post"}).save_model(tmp_path / "sae")
    return tmp_path


def test_evaluate(folder, monkeypatch):
    drawn = []
    save = plots._save
    monkeypatch.setattr("nnato.feature_plots._save", lambda figure, path: (drawn.append(figure), save(figure, path))[1])
    where = ("features", "evaluate", folder / "moments", "--target", "3", "--sae", folder / "sae", "--force", "--random", "30")
    results = check_envelope(run(*where, "--json", "--out", folder / "out"))
    assert results == json.loads((folder / "out" / "features.json").read_text())
    assert [(pair["source"], pair["target"]) for pair in results["pairs"]] == [(0, 3), (1, 3)]
    direct = evaluate_features(load_moments(folder / "moments"), load_dictionary(folder / "sae"), [(0, 3), (1, 3)], random=30, force=True)
    rows = list(csv.DictReader((folder / "out" / "features.csv").open()))
    assert len(rows) == 2 * LATENTS
    for pair, result, some in zip(results["pairs"], direct, (rows[:LATENTS], rows[LATENTS:]), strict=True):
        r2 = result.scores.r2["transport"].value
        assert pair["r2"]["transport"]["0.5"] == pytest.approx(float(torch.quantile(r2, 0.5)))
        assert pair["active"]["tokens"] == pair["active"]["sampled"]["tokens"] > 100
        assert [float(row["r2"]) for row in some] == pytest.approx(r2.tolist())
        assert {row["verdict"].split()[0] for row in some} <= set(VERDICTS)
    left, right = drawn[0].axes
    assert list(left.lines[0].get_xdata()) == pytest.approx(sorted(direct[0].scores.r2["transport"].value.tolist()))
    assert sum(bar.get_height() for bar in right.patches) == pytest.approx(2)
    table = run(*where, "--leap", "2", "--features", "3,17", "--moments-only").stdout
    assert "1 → 3" in table
    assert "0 → 3" not in table
    assert "where features are active" not in table
    (folder / "list.json").write_text("[5, 2]")
    some = check_envelope(run(*where, "--features", folder / "list.json", "--sample", "7", "--json"))
    active = some["pairs"][0]["active"]
    assert active["sampled"]["tokens"] == -(-active["tokens"] // 7)
    assert some["pairs"][0]["r2"]["transport"]["features"] == 2


def test_refused(folder):
    where = ("features", "evaluate", folder / "moments", "--sae", folder / "sae")
    assert "not at 1" in run(*where, "--target", "1", "--force", code=2).stderr
    assert "no pair with target 2" in run(*where, "--target", "2", code=2).stderr
    assert "latents 0 … 39" in run(*where, "--target", "3", "--features", "99", code=2).stderr
    assert "write all, numbers" in run(*where, "--target", "3", "--features", "best", code=2).stderr
    assert "low < high" in run(*where, "--target", "3", "--low", "0.7", code=2).stderr
    assert "no SAE" in run("features", "evaluate", "--target", "3", "--sae", "nothing", code=2).stderr
