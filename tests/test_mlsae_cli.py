"""`nnato mlsae` and `nnato lens` from training to figures, on a tiny model; figures and published checkpoints."""

from __future__ import annotations

import csv
import json
import re
import warnings

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import BLOCKS, WIDTH
from test_lens import tuned_lens_folder
from test_multilayer import LATENTS, K, authors_checkpoint

from nnato import published
from nnato.cli import main
from nnato.dictionaries import load_dictionary
from nnato.errors import DictionaryError
from nnato.lens import Lens


def invoke(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + str(result.exception)
    return result


def results(*arguments):
    return json.loads(invoke(*arguments, "--json").stdout)["results"]


def table(*arguments):
    """What a command prints, if no column of its tables was cut and no title was broken in 80 columns."""
    shown = invoke(*arguments).stdout
    assert "…" not in shown
    assert "┃" not in shown
    return shown


@pytest.fixture(scope="module")
def trained(saved_model, text, tmp_path_factory):
    """An SAE of a tiny model and the options that name model and text."""
    folder = tmp_path_factory.mktemp("mlsae")
    words = ["--text", text, "--context", "32", "--per-document", "0", "--tokens", "100000"]
    recipe = ["--expansion", "4", "-k", "4", "--tokens", "1500", "--rows", "128", "--buffer", "512", "--lr", "3e-3"]
    record = results("mlsae", "train", saved_model, *words[:-2], *recipe, "--out", folder)
    assert record["sites"] == list(range(BLOCKS))
    assert record["latents"] == 4 * WIDTH
    return folder, words


@pytest.fixture(scope="module")
def lens(saved_model, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lens")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NNATO_CACHE", str(folder / "cache"))
        words = ["--text", text, "--context", "32", "--per-document", "0", "--tokens", "100000"]
        record = results("lens", "fit", "--model", saved_model, *words, "--out", folder)
    assert record["sites"] == ["embed", *range(BLOCKS)]
    return folder, words


def test_layers_on_a_server_are_those_here(trained, tmp_path):
    folder, words = trained
    command = ["mlsae", "layers", folder, *words, "--out"]
    there = invoke(*command, tmp_path / "there", "--dry-run-remote", "--per-job", "2", "--json")
    assert re.search(r"tokens in \d+ jobs: at most .* to send in all, .* back from each job", there.stderr)
    here = results(*command, tmp_path / "here")
    found = json.loads(there.stdout)["results"]
    assert found["tokens"] == here["tokens"]
    assert found["means"] == pytest.approx(here["means"], rel=1e-9)
    for row, wanted in zip(found["metrics"], here["metrics"], strict=True):
        assert row == {**wanted, "fvu": row["fvu"]} | {
            key: pytest.approx(wanted[key], rel=1e-9) for key in ("fvu_mlsae", "mse", "l0", "l1")
        }
        assert row["fvu"]["value"] == pytest.approx(wanted["fvu"]["value"], rel=1e-9)
    assert (tmp_path / "there" / "layers.png").is_file()
    for option in (["--costs", "2"], ["--shard", "1/2"]):
        refused = invoke(*command, tmp_path / "no", "--dry-run-remote", *option, code=2)
        assert "--costs and --shard belong to runs here" in refused.stderr


def test_layers(trained, tmp_path):
    folder, words = trained
    record = results("mlsae", "layers", folder, *words, "--as-published", "--costs", "2", "--out", tmp_path)
    assert [row["site"] for row in record["metrics"]] == list(range(BLOCKS))
    assert list(record["variance"]) == ["activation", "uniform", "published"]
    assert record["variance"]["activation"]["ratio"]["value"] >= 1
    assert len(record["costs"]) == BLOCKS
    rows = list(csv.DictReader((tmp_path / "layers.csv").open()))
    assert len(rows) == 4 * WIDTH
    assert {"mean", "std", "entropy", "dip", "persistence", "total_3"} <= set(rows[0])
    for name in ("layers.png", "reconstruction.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    shown = table("mlsae", "layers", folder, *words, "--layers", "1,3")
    assert "Variance of the layer L: of all, of a latent F, of F at a token T\n" in shown.replace(" \n", "\n")
    assert re.search(r"activation .*\]  *\S+ \[\S+ \S+\]$", shown, re.MULTILINE), "an interval is broken over lines"
    assert "published" not in shown


def test_layers_by_shards(trained, tmp_path):
    folder, words = trained
    whole = results("mlsae", "layers", folder, *words, "--as-published", "--batch-size", "2")
    for number in (1, 2):
        shown = invoke("mlsae", "layers", folder, *words, "--batch-size", "2", "--shard", f"{number}/2", "--out", tmp_path / f"{number}")
        assert f"shard {number}/2: " in shown.stdout
    assert "1 of 2 shards are missing" in invoke("merge", tmp_path / "1", "--out", tmp_path / "all", code=2).output
    record = results("merge", tmp_path / "1", tmp_path / "2", "--out", tmp_path / "all")
    assert record["tokens"] == whole["tokens"]
    merged = results("mlsae", "layers", folder, *words, "--as-published", "--batch-size", "2", "--out", tmp_path / "all")
    assert merged["variance"]["activation"]["ratio"]["value"] == pytest.approx(whole["variance"]["activation"]["ratio"]["value"], rel=1e-12)
    assert merged["variance"]["published"]["ratio"]["value"] == pytest.approx(whole["variance"]["published"]["ratio"]["value"], rel=1e-12)
    assert "layer statistics of" in invoke("merge", tmp_path / "1", tmp_path / "2", "--out", tmp_path / "all").stdout
    for wrong, message in [
        (["--shard", "1/2"], "a shard needs a folder"),
        (["--shard", "3/2", "--out", tmp_path / "x"], "shard 3/2: give for example"),
        (["--shard", "1/2", "--out", tmp_path / "x", "--costs", "2"], "--costs belongs to the whole text"),
    ]:
        assert message in invoke("mlsae", "layers", folder, *words, *wrong, code=2).output


def test_similarity_examples_and_prompt(trained, tmp_path):
    folder, words = trained
    record = results("mlsae", "similarity", folder, *words, "--latents", "3,5")
    assert [(one["source"], one["target"]) for one in record["layers"]] == [(0, 1), (1, 2), (2, 3)]
    assert 0 < record["mmcs"] < 1
    assert len(record["tokens"]["embedding"]["3"]) == 8
    assert "MMCS" in table("mlsae", "similarity", folder, *words, "--latents", "3", "--out", tmp_path)
    examples = results("mlsae", "examples", folder, *words, "--count", "2")
    assert all(len(ones) == 2 for ones in examples.values())
    assert len(examples) == 10
    assert "«" in invoke("mlsae", "examples", folder, *words, "--latents", next(iter(examples)), "--layer", "1", "--out", tmp_path).stdout
    found = results("mlsae", "prompt", folder, "w3 w5 w7 w9", "--html", tmp_path / "p.html")
    assert found["tokens"] == ["<bos>", "w3", "w5", "w7", "w9"]
    assert "<table>" in (tmp_path / "p.html").read_text()
    assert "latest mean layer first" in invoke("mlsae", "prompt", folder, "w3 w5 w7 w9").stdout


def test_steer(trained, lens, saved_model, tmp_path):
    folder, _ = trained
    record = results("mlsae", "steer", folder, "w3 w5 w7 w9", "--latent", "3", "--layer", "0", "--factor", "0", "--count", "4")
    assert record["site"] == 0
    assert record["kl"]["steered"] == 0
    assert record["top"]["steered"] == record["top"]["model"]
    assert len(record["top"]["reconstruction"]) == 4
    shown = invoke("mlsae", "steer", folder, "w3 w5 w7 w9", "--latent", "3", "--layer", "2", "--factor", "-30", "--positions", "all").stdout
    assert "latent 3, layer 2, factor -30" in shown
    assert "does not exist" in invoke("mlsae", "steer", folder, "--latent", "3", "--layer", "9", code=2).stderr
    assert "there is no latent 999" in invoke("mlsae", "steer", folder, "--latent", "999", "--layer", "1", code=2).stderr
    lens_folder, words = lens
    recipe = ["--expansion", "4", "-k", "4", "--tokens", "600", "--rows", "128", "--buffer", "512", "--lens", lens_folder]
    invoke("mlsae", "train", saved_model, *words[:-2], *recipe, "--out", tmp_path)
    behind = results("mlsae", "steer", tmp_path, "w3 w5 w7 w9", *words, "--latent", "3", "--layer", "1", "--factor", "30")
    assert behind["kl"]["steered"] > 0


def test_sweep(saved_model, text, tmp_path):
    words = ["--text", text, "--context", "32", "--per-document", "0", "--tokens", "400", "--rows", "64", "--buffer", "256"]
    arguments = ["mlsae", "sweep", saved_model, "--expansions", "2,1", "--ks", "2,4", *words, "--out", tmp_path]
    record = results(*arguments)
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert [(row["expansion"], row["k"]) for row in rows] == [("1", "2"), ("1", "4"), ("2", "2"), ("2", "4")]
    names = {f"{name}_{what}" for name in ("std", "rel") for what in ("mean", "var", "std", "sem")}
    assert names <= set(rows[0])
    assert [float(row["rel_sem"]) for row in rows] == [row["rel_sem"] for row in record]
    assert "4 SAEs" in table(*arguments)
    assert "--ks 'x': write" in invoke(*arguments, "--ks", "x", code=2).stderr
    assert "expansion 0: give at least 1" in invoke(*arguments, "--expansions", "0", code=2).stderr


def test_card(trained):
    folder, _ = trained
    record = results("mlsae", "card", folder)
    assert set(record["files"]) == {"README.md", "cfg.json", "sae_weights.safetensors"}
    shown = invoke("mlsae", "card", folder).stdout
    assert "nothing was sent" in shown
    assert "cfg.json names paths of this machine" in shown  # the tiny model lies in a folder
    assert "holds no cfg.json" in invoke("mlsae", "card", folder / "nothing", code=2).stderr


def test_transport(trained, tmp_path, monkeypatch):
    from nnato.latent_transport import LatentTransport

    often = LatentTransport.coincidence
    monkeypatch.setattr(LatentTransport, "coincidence", lambda self, pair: often(self, pair, at_least=2))
    folder, words = trained
    moments = tmp_path / "moments"
    invoke("accumulate", load_dictionary(folder).model["name"], *words, "--pairs", "0:1,1:2", "--out", moments)
    record = results("mlsae", "transport", folder, *words, "--moments", moments, "--out", tmp_path)
    assert [(one["source"], one["target"]) for one in record] == [(0, 1), (1, 2)]
    assert list(csv.DictReader((tmp_path / "transport.csv").open()))
    assert "stay on" in table("mlsae", "transport", folder, *words, "--moments", moments)


def test_an_sae_behind_a_lens(lens, saved_model, tmp_path):
    folder, words = lens
    recipe = ["--expansion", "4", "-k", "4", "--tokens", "600", "--rows", "128", "--buffer", "512", "--lens", folder]
    record = results("mlsae", "train", saved_model, *words[:-2], *recipe, "--out", tmp_path)
    assert record["sites"] == list(range(BLOCKS))
    assert Lens.load(tmp_path).digest == Lens.load(folder).digest
    seen = results("mlsae", "layers", tmp_path, *words, "--costs", "1")
    assert np.isfinite([one["kl"]["value"] for one in seen["costs"]]).all()
    stripped = tmp_path / "stripped"
    stripped.mkdir()
    for name in ("cfg.json", "sae_weights.safetensors"):
        (stripped / name).write_bytes((tmp_path / name).read_bytes())
    error = invoke("mlsae", "layers", stripped, *words, code=2).stderr
    assert "was trained behind a lens" in error
    again = results("mlsae", "layers", stripped, *words, "--lens", folder)
    assert again["metrics"] == seen["metrics"]


def test_lens_commands(lens, saved_model, model, tmp_path):
    folder, words = lens
    scores = results("lens", "evaluate", folder, *words, "--sequences", "3", "--out", tmp_path)
    assert [one["site"] for one in scores["lens"]] == ["embed", *range(BLOCKS)]
    assert scores["lens"][1]["kl"]["value"] < scores["logit lens"][1]["kl"]["value"]
    assert (tmp_path / "lens.png").read_bytes().startswith(b"\x89PNG")
    assert "logit lens agrees" in table("lens", "evaluate", folder, *words, "--sequences", "2", "--sites", "1,2")
    exported = tmp_path / "tuned"
    assert results("lens", "export", folder, "--out", exported) == {"path": str(exported)}
    assert "lens evaluate" in invoke("lens", "load", exported, "--model", saved_model, "--out", tmp_path / "again").stdout
    x = torch.randn(4, WIDTH)
    torch.testing.assert_close(Lens.load(tmp_path / "again")(x, 1), Lens.load(folder)(x, 1), atol=1e-3, rtol=1e-3)
    tuned_lens_folder(tmp_path / "foreign", num_hidden_layers=9)
    assert "9 blocks" in invoke("lens", "load", tmp_path / "foreign", "--model", saved_model, code=2).stderr
    shown = table("lens", "fit", "--model", saved_model, *words, "--kl-steps", "4", "--out", tmp_path / "trained")
    assert "training by KL" in shown


def test_published_checkpoints(tmp_path):
    """The converted SAE encodes as the checkpoint does, with and without nnato."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens import SAE

    folder = authors_checkpoint(tmp_path / "authors")
    record = results("mlsae", "import", folder, "--model", "tiny", "--layers", "0,1,2,3", "--out", tmp_path / "out")
    assert record == {"path": str(tmp_path / "out")}
    first, second = load_dictionary(f"mlsae:{folder}"), load_dictionary(tmp_path / "out")
    assert second.sites == (0, 1, 2, 3)
    assert second.model["name"] == "tiny"
    assert (second.k, second.latents) == (K, LATENTS)
    sae = SAE.load_from_disk(tmp_path / "out")
    x = torch.randn(30, WIDTH) * 4
    with torch.no_grad():
        for found in (second.encode(x), sae.encode(x)):
            torch.testing.assert_close(found, first.encode(x), atol=1e-6, rtol=0)
        torch.testing.assert_close(sae.decode(sae.encode(x)), first.decode(first.encode(x), x), atol=1e-5, rtol=0)
    assert "sae_lens' format" in invoke("mlsae", "import", folder, "--out", tmp_path / "out").stdout


def test_published_checkpoints_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(DictionaryError, match="give a folder"):
        published.import_mlsae(tmp_path, tmp_path / "out")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "from the hub" in invoke("mlsae", "import", "nobody/nothing", "--out", tmp_path / "out", code=2).stderr


def test_bad_options(trained):
    folder, words = trained
    assert "write for example 5,17" in invoke("mlsae", "examples", folder, *words, "--latents", "x", code=2).stderr
    assert "site 9 does not exist" in invoke("mlsae", "layers", folder, *words, "--layers", "9", code=2).stderr
    assert "no SAE" in invoke("mlsae", "prompt", "nowhere/", code=2).stderr
    assert "No such option" in invoke("mlsae", "prompt", "nowhere/", "--text", "a.txt", code=2).stderr  # it reads no text
