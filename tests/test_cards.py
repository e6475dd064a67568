"""Model cards: what is in them, which files belong on a hub, and that nothing is sent."""

from __future__ import annotations

import dataclasses
import json
import socket

import pytest
from conftest import BLOCKS, WIDTH
from test_multilayer import authors_checkpoint

from nnato.cards import write_card
from nnato.errors import DictionaryError, MomentsError
from nnato.lens import logit_lens
from nnato.models import describe
from nnato.multilayer import layer_activity, load_multilayer
from nnato.published import import_mlsae
from nnato.sae_training import Recipe, train_sae

RECIPE = Recipe(expansion=2, k=4, tokens=400, rows=64, buffer=256)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_a_trained_sae(model, corpus, tmp_path):
    train_sae(model, None, RECIPE, out=tmp_path, corpus=corpus)
    card = write_card(tmp_path)
    text = card.path.read_text()
    assert text.startswith("---\nlibrary_name: sae_lens\n")
    assert f"| latents | {2 * WIDTH} |" in text
    assert "| layers (block outputs) | 0, 1, 2, 3 |" in text
    assert "| training tokens | 400 |" in text
    assert "left out" not in text
    assert card.files == {name: (tmp_path / name).stat().st_size for name in ("README.md", "cfg.json", "sae_weights.safetensors")}
    assert card.left == ["checkpoint.safetensors"]
    activity = layer_activity(model, load_multilayer(tmp_path, describe(model)), corpus, out=tmp_path)
    again = write_card(tmp_path)
    row = activity.metrics()[2]
    assert f"| 2 | {row['fvu'].value:.3f} [{row['fvu'].low:.3f}, {row['fvu'].high:.3f}] |" in again.path.read_text()
    assert f"## On {activity.stats.tokens:,} test tokens" in again.path.read_text()
    assert again.left == ["checkpoint.safetensors", "layers.safetensors"]


def test_paths_of_this_machine_are_left_out_of_the_card_and_named(model, corpus, tmp_path):
    train_sae(model, None, RECIPE, out=tmp_path, corpus=corpus)
    config = json.loads((tmp_path / "cfg.json").read_text())
    config["metadata"]["model_name"] = "/home/me/models/tiny"
    config["metadata"]["nnato_text"]["source"] = "~/texts/mine.txt"
    config["metadata"]["nnato_provenance"]["command"] = "nnato mlsae train --out /home/me/out"
    config["metadata"]["nnato_other"] = "owner/name and https://host/page"
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    card = write_card(tmp_path)
    assert "/home" not in card.path.read_text()
    assert "Multi-layer sparse autoencoder of tiny" in card.path.read_text()
    assert "| text | mine.txt |" in card.path.read_text()
    assert {"/home/me/models/tiny", "~/texts/mine.txt", "/home/me/out"} <= set(card.local)
    assert not [one for one in card.local if "owner" in one or "host" in one]


def test_a_hub_id_is_the_base_model(tmp_path):
    import_mlsae(authors_checkpoint(tmp_path / "authors"), tmp_path / "out", model="EleutherAI/pythia-70m-deduped", sites=[0, 1])
    text = write_card(tmp_path / "out").path.read_text()
    assert 'base_model: "EleutherAI/pythia-70m-deduped"\n' in text
    assert "# Multi-layer sparse autoencoder of EleutherAI/pythia-70m-deduped\n" in text


def test_an_sae_behind_a_lens(model, corpus, tmp_path):
    train_sae(model, None, RECIPE, out=tmp_path, corpus=corpus, lens=logit_lens(BLOCKS, WIDTH))
    assert "lens.safetensors" in write_card(tmp_path).files
    (tmp_path / "lens.safetensors").unlink()
    with pytest.raises(DictionaryError, match=r"put its lens\.safetensors beside it"):
        write_card(tmp_path)


def test_what_is_no_sae_is_refused(model, corpus, tmp_path):
    with pytest.raises(DictionaryError, match=r"holds no cfg\.json"):
        write_card(tmp_path)
    for number, name in enumerate(("one", "other")):
        train_sae(model, None, dataclasses.replace(RECIPE, seed=number), out=tmp_path / name, corpus=corpus)
    layer_activity(model, load_multilayer(tmp_path / "one", describe(model)), corpus, out=tmp_path / "numbers")
    write_card(tmp_path / "one", tmp_path / "numbers")
    with pytest.raises(MomentsError, match="of another SAE"):
        write_card(tmp_path / "other", tmp_path / "numbers")
    assert not (tmp_path / "other" / "README.md").exists()
