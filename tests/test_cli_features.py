"""`nnato features` as a user types it."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from conftest import hook_residuals
from test_cli import TEXT, check_envelope, run
from test_dictionaries import LATENTS, make_sae
from test_report import Page

from nnato import active_scores, feature_traits, plots
from nnato.accumulation import load_moments, tokenize
from nnato.active_scores import paper_metrics
from nnato.cli.feature_show import show_feature
from nnato.corpus import Corpus
from nnato.dictionaries import load_dictionary
from nnato.feature_controls import matched_on_rate
from nnato.feature_page import Feature, write_feature_page
from nnato.feature_pass import feature_pass
from nnato.features import evaluate_features
from nnato.models import load_model
from nnato.sites import ResidualSite
from nnato.top_examples import Example
from nnato.verdicts import VERDICTS


@pytest.fixture
def folder(saved_model, text, tmp_path):
    run("accumulate", saved_model, "--pairs", "0:3,1:3,0:1", "--text", text, *TEXT, "--out", tmp_path / "moments")
    make_sae("topk", metadata={"hook_name": "blocks.3.hook_resid_post"}).save_model(tmp_path / "sae")
    return tmp_path


def test_evaluate(folder, monkeypatch):
    drawn = []
    save = plots.save_figure
    monkeypatch.setattr("nnato.feature_plots.save_figure", lambda figure, path: (drawn.append(figure), save(figure, path))[1])
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


def test_select_then_evaluate_beside_controls(folder, saved_model, text, monkeypatch):
    monkeypatch.setattr(feature_traits, "FEWEST_TOKENS", 20)
    sae = ("--sae", folder / "sae", "--target", "3")
    where = ("features", "select", saved_model, *sae, "--text", text, *TEXT, "--top", "20%", "--out", folder / "chosen")
    shown = run(*where).stdout
    assert "of 8 features (corrected score)" in shown
    file = folder / "chosen" / "selected.json"
    record = json.loads(file.read_text())
    assert len(record["features"]) == 8
    again = check_envelope(run(*where, "--json"))
    assert again == {"path": str(file), **json.loads(file.read_text())}
    assert again["features"] == record["features"]
    scores = [row["score"] for row in record["terms"]]
    assert scores == sorted(scores, reverse=True)
    moments = ("features", "evaluate", folder / "moments", *sae, "--force", "--random", "30")
    got = check_envelope(run(*moments, "--features", file, "--preset", "paper", "--out", folder / "out", "--json"))
    resumed = check_envelope(run(*moments, "--features", file, "--preset", "paper", "--out", folder / "out", "--json"))
    assert resumed == got
    assert (folder / "out" / "pass.safetensors").exists()
    control = matched_on_rate(torch.tensor(record["rate"]), torch.tensor(record["features"]))
    rows = list(csv.DictReader((folder / "out" / "features.csv").open()))
    assert [int(row["feature"]) for row in rows] == record["features"] * 2
    accumulated, dictionary = load_moments(folder / "moments"), load_dictionary(folder / "sae")
    maps = [one.operator for one in evaluate_features(accumulated, dictionary, [(0, 3), (1, 3)], random=30, force=True)]
    blocks = tokenize(load_model(str(saved_model)), Corpus(str(text), context=32, per_document=None, tokens=100_000))
    direct = feature_pass(load_model(str(saved_model)), blocks, dictionary, maps, record["features"], paper=True)
    for place, pair in enumerate(got["pairs"]):
        direct_control = evaluate_features(accumulated, dictionary, [(place, 3)], control, random=30, force=True)[0]
        assert pair["matched"]["r2"]["transport"]["0.5"] == pytest.approx(float(direct_control.scores.r2["transport"].value.quantile(0.5)))
        assert pair["matched"]["verdicts"] == dict(direct_control.verdicts.counts())
        mine = [float(row["r2"]) for row in rows[8 * place : 8 * place + 8]]
        assert pair["selection"]["selected"]["mean"]["value"] == pytest.approx(sum(mine) / 8)
        assert pair["active"]["missing"] == direct.summary(place)["missing"]
        assert pair["active"]["auc"]["known"] + sum(pair["active"]["missing"].values()) == 8
        for name, values in paper_metrics(direct, place).items():
            assert [float(row[name]) for row in rows[8 * place : 8 * place + 8]] == pytest.approx(values.tolist(), nan_ok=True)
            known = values[direct.reasons() == 0]
            assert pair["paper"][name]["known"] == len(known)
            assert pair["paper"][name]["mean"] == (pytest.approx(float(known.mean())) if len(known) else None)
    table = run(*moments, "--features", "3,17", "--preset", "paper")
    assert "selected - same rates" in table.stdout
    assert "r_pearson" in table.stdout
    (folder / "list.json").write_text("[3]")
    bare = run(*moments, "--features", folder / "list.json", "--moments-only")
    assert "does not say how often" in bare.stderr
    assert "same rates" not in bare.stdout


def test_selecting_is_refused(folder, saved_model):
    where = ("features", "select", saved_model, "--target", "3", "--sae", folder / "sae")
    assert "write a share" in run(*where, "--top", "best", code=2).stderr
    assert "at least 3 sequences" in run(*where, "--sequences", "1", code=2).stderr
    paper = ("features", "evaluate", folder / "moments", "--target", "3", "--sae", folder / "sae", "--preset", "paper", "--moments-only")
    assert "leave --moments-only away" in run(*paper, code=2).stderr


def test_explain(folder, tmp_path):
    make_sae("topk", metadata={"hook_name": "blocks.3.hook_resid_post", "neuronpedia_id": "tiny/3-res"}).save_model(tmp_path / "known")
    file, export = tmp_path / "list.json", tmp_path / "batch-0.jsonl"
    file.write_text("[17, 3]")
    record = {"modelId": "tiny", "layer": "3-res", "index": "3", "description": "[bold]words[/]", "explanationModelName": "some"}
    export.write_text(json.dumps(record))
    where = ("features", "explain", file, "--sae", tmp_path / "known")
    shown = run(*where, "--export", export).stdout
    assert "https://www.neuronpedia.org/tiny/3-res/17" in shown
    assert "[bold]words[/]  (some)" in shown
    got = check_envelope(run(*where, "--url", "http://127.0.0.1:9", "--json"), model=False)
    assert [one["feature"] for one in got["features"]] == [17, 3]
    assert "no explanations from http://127.0.0.1:9" in got["unavailable"]
    assert "Links only" in run(*where, "--url", "http://127.0.0.1:9").stdout
    assert "is not there at all" in run("features", "explain", file, "--sae", folder / "sae", code=2).stderr
    assert "does not exist" in run("features", "explain", tmp_path / "nothing.json", code=2).stderr


def test_show(folder, saved_model, text, monkeypatch):
    make_sae("topk", metadata={"hook_name": "blocks.3.hook_resid_post", "neuronpedia_id": "tiny/3-res"}).save_model(folder / "known")
    where = (folder / "moments", "--sae", folder / "known", "--force")
    dictionary = load_dictionary(folder / "known")
    blocks = tokenize(load_model(str(saved_model)), Corpus(str(text), context=32, per_document=None, tokens=100_000)).only("test")
    z, places = [], []
    for number, row in enumerate(blocks.plan(1)):
        tokens = blocks.batch(row)
        seen, _ = hook_residuals(load_model(str(saved_model))._module, tokens.ids)
        z.append(dictionary.encode(seen[3][0, 1:]))
        places += [(number, position) for position in range(1, tokens.ids.shape[1])]
    rows, z = blocks.plan(1), torch.cat(z)
    often = int((z > 0).sum(0).argmax())
    got = check_envelope(run("features", "show", f"3:{often}", *where, "--out", folder / "out", "--json"))
    assert got == json.loads((folder / "out" / f"feature-3-{often}.json").read_text())
    direct = evaluate_features(load_moments(folder / "moments"), dictionary, [(0, 3), (1, 3)], [often], force=True)
    for row, result, leap in zip(got["sources"], direct, (3, 2), strict=True):
        assert row["leap"] == leap
        assert row["r2"]["transport"]["value"] == pytest.approx(float(result.scores.r2["transport"].value[0]))
        assert row["verdict"] == result.verdicts.name(0)
    best = z[:, often].argsort(descending=True)[:8].tolist()
    assert [one["activation"] for one in got["examples"]] == pytest.approx(z[best, often].tolist(), abs=1e-4)
    row, position = places[best[0]]
    word = load_model(str(saved_model)).tokenizer.decode([int(blocks.batch(rows[row]).ids[0, position])])
    assert got["examples"][0]["tokens"][got["examples"][0]["at"]] == word
    assert got["rate"] == pytest.approx(float((z[:, often] > 0).double().mean()), abs=1e-9)
    page = Page((folder / "out" / f"feature-3-{often}.html").read_text())
    assert page.addresses == [f"https://www.neuronpedia.org/tiny/3-res/{often}"] == [got["link"]]
    assert "script" not in page.tags
    shown = run("features", "show", f"3:{often}", *where, "--leap", "2").stdout
    assert got["link"] in shown
    assert word in shown
    monkeypatch.setattr(active_scores.FeaturePass.reasons, "__defaults__", (10**6, 10))
    bare = run("features", "show", f"3:{often}", *where, "--out", folder / "bare").stdout
    assert "No scores of active tokens: too few active tokens." in bare
    assert "too few active tokens" in (folder / "bare" / f"feature-3-{often}.html").read_text()
    for wrong in ("3", "3:x", ":3"):
        assert "write site:latent" in run("features", "show", wrong, *where, code=2).stderr
    assert "latents 0 … 39" in run("features", "show", "3:40", *where, code=2).stderr
    assert "ask for at least one" in run("features", "show", "3:1", *where, "--examples", "0", code=2).stderr


def test_the_widest_feature_fits_into_eighty_columns(monkeypatch, capsys):
    row = {
        "source": 10,
        "r2": {
            "transport": {"value": -1.234, "low": -2.3, "high": -0.2},
            "identity_shift": {"value": -12.345, "low": -13.4, "high": -11.3},
        },
        "ceiling": {"value": 0.866, "low": 0.8, "high": 0.9},
        "active": {"r2": {"value": -12.345, "low": -13.4, "high": -11.3}, "latent_r2": -12.345, "auc": 0.987},
        "verdict": "transported (mapped)",
    }
    monkeypatch.setenv("COLUMNS", "80")
    show_feature(Feature(12_345, ResidualSite(12), [row], "", 0.1, [], None, {}))
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert "-1.234±1.050" in shown
    assert "transported (mapped)" in shown


def test_a_page_shows_tokens_as_text(folder, saved_model):
    example = Example(1, ResidualSite(3), 2.0, ("<script>alert(1)</script>", "b"), 0, 7)
    about = {"model": {"name": "<i>"}, "text": {"source": "t"}, "sae": {"source": "s"}, "provenance": {"command": "c", "nnato": "0"}}
    path = write_feature_page(Feature(1, ResidualSite(3), [], "never active", 0.0, [example], None, about), folder / "page.html")
    assert Page(path.read_text()).tags.count("script") == 0
    assert "<i>" not in path.read_text()


def test_refused(folder):
    where = ("features", "evaluate", folder / "moments", "--sae", folder / "sae")
    assert "not at 1" in run(*where, "--target", "1", "--force", code=2).stderr
    assert "no pair with target 2" in run(*where, "--target", "2", code=2).stderr
    assert "latents 0 … 39" in run(*where, "--target", "3", "--features", "99", code=2).stderr
    assert "write all, numbers" in run(*where, "--target", "3", "--features", "best", code=2).stderr
    assert "low < high" in run(*where, "--target", "3", "--low", "0.7", code=2).stderr
    assert "no SAE" in run("features", "evaluate", "--target", "3", "--sae", "nothing", code=2).stderr
