"""Dictionaries: parity with sae_lens for every kind, where they belong, and what is refused."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nnato.dictionaries import Dictionary, load_dictionary, origin
from nnato.errors import DictionaryError
from nnato.models import describe
from nnato.sites import ResidualSite

D, LATENTS, K = 16, 40, 5
KINDS = ["standard", "jumprelu", "topk", "gated"]


def make_sae(kind, scaling="none", apply_b_dec=True, rescale=False, metadata=None):
    """An SAE of sae_lens with random weights, and decoder rows of various norms."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sae_lens
    names = {"standard": "StandardSAE", "jumprelu": "JumpReLUSAE", "topk": "TopKSAE", "gated": "GatedSAE"}
    more = {"k": K, "rescale_acts_by_decoder_norm": rescale} if kind == "topk" else {}
    config = getattr(sae_lens, names[kind] + "Config")(
        d_in=D, d_sae=LATENTS, apply_b_dec_to_input=apply_b_dec, normalize_activations=scaling, **more
    )
    for name, value in (metadata or {}).items():
        config.metadata[name] = value
    sae = getattr(sae_lens, names[kind])(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if "W_" in name else 0.1))
        if kind == "jumprelu":
            sae.threshold.abs_()
    return sae


def assert_same(found, expected):
    """Equal to 1e-6, of the largest value if that is above one."""
    assert float((found - expected).abs().max()) <= 1e-6 * max(1.0, float(expected.abs().max()))


@pytest.fixture
def x():
    return torch.randn(3, 7, D, generator=torch.Generator().manual_seed(1)) * 2 + 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scaling", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_encode_and_decode_are_those_of_sae_lens(tmp_path, x, kind, scaling, apply_b_dec):
    sae = make_sae(kind, scaling, apply_b_dec)
    sae.save_model(tmp_path)
    dictionary = load_dictionary(tmp_path)
    with torch.no_grad():
        activations = sae.encode(x)
        decoded = sae.decode(activations)
    found = dictionary.encode(x)
    assert 0 < (found > 0).float().mean() < 1
    assert (found > 0).equal(activations > 0)
    assert_same(found, activations)
    assert_same(dictionary.decode(found, x), decoded)
    # Without state: the same again.
    assert_same(dictionary.decode(found, x), decoded)
    chosen = torch.tensor([3, 0, 17])
    assert_same(dictionary.encode(x, chosen), activations[..., chosen])
    assert (dictionary.d_model, dictionary.latents) == (D, LATENTS)


def test_top_k_with_decoder_norms_folded(tmp_path, x):
    sae = make_sae("topk", rescale=True)
    sae.save_model(tmp_path)
    dictionary = load_dictionary(tmp_path)
    with torch.no_grad():
        activations = sae.encode(x)
        decoded = sae.decode(activations)
    assert_same(dictionary.encode(x), activations)
    assert_same(dictionary.decode(dictionary.encode(x)), decoded)
    torch.testing.assert_close(torch.linalg.vector_norm(dictionary.W_dec, dim=1), torch.ones(LATENTS))


def test_sparse_is_dense(tmp_path, x):
    make_sae("topk", "layer_norm").save_model(tmp_path)
    dictionary = load_dictionary(f"mlsae:{tmp_path}")
    values, latents = dictionary.encode_sparse(x)
    assert values.shape == latents.shape == (3, 7, K)
    dense = torch.zeros(3, 7, LATENTS).scatter_(-1, latents, values)
    assert dense.equal(dictionary.encode(x))
    assert_same(dictionary.decode_sparse(values, latents, x), dictionary.decode(dense, x))
    with pytest.raises(DictionaryError, match="give the residuals too"):
        dictionary.decode(dense)


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_active_above_their_bars(tmp_path, x, kind):
    dictionary = load_dictionary_of(kind, tmp_path)
    activations, pre = dictionary.encode(x), dictionary.pre_activations(x)
    on = pre > dictionary.bars(pre)
    assert on.equal(activations > 0)
    latents = torch.arange(LATENTS).expand_as(pre)
    assert_same(dictionary.magnitudes(pre[on], latents[on]), activations[on])


def test_trained_batch_top_k_is_jump_relu(tmp_path, x):
    import sae_lens

    config = sae_lens.BatchTopKTrainingSAEConfig(d_in=D, d_sae=LATENTS, k=K, rescale_acts_by_decoder_norm=True)
    sae = sae_lens.BatchTopKTrainingSAE(config)
    sae.topk_threshold.fill_(0.4)
    sae.save_inference_model(tmp_path)
    reference = sae_lens.SAE.load_from_disk(tmp_path)
    dictionary = load_dictionary(tmp_path)
    assert dictionary.kind == "jumprelu"
    assert_same(dictionary.encode(x), reference.encode(x).detach())


def gemma_scope(folder, rng=None):
    """A toy SAE in the files of Gemma Scope 1; (path, arrays)."""
    rng = rng or np.random.default_rng(0)
    folder.mkdir(parents=True)
    arrays = {"W_enc": rng.normal(size=(D, LATENTS)), "W_dec": rng.normal(size=(LATENTS, D)), "b_enc": rng.normal(size=LATENTS)}
    arrays |= {"b_dec": rng.normal(size=D), "threshold": abs(rng.normal(size=LATENTS))}
    np.savez(folder / "params.npz", **{name: array.astype(np.float32) for name, array in arrays.items()})
    return folder / "params.npz", arrays


def test_gemma_scope_files(tmp_path, x):
    path, arrays = gemma_scope(tmp_path / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71")
    dictionary = load_dictionary(path)
    assert dictionary.sites == (ResidualSite(20),)
    assert dictionary.model == {"name": "gemma-2-2b"}
    pre = x.double().numpy() @ arrays["W_enc"] + arrays["b_enc"]
    expected = pre * (pre > arrays["threshold"])  # their formula; thresholds are positive
    np.testing.assert_allclose(dictionary.encode(x).numpy(), expected, atol=2e-5)
    assert load_dictionary(path.parent).fingerprint()["digest"] == dictionary.fingerprint()["digest"]
    elsewhere = load_dictionary(gemma_scope(tmp_path / "other")[0])
    assert (elsewhere.sites, elsewhere.model) == ((), {})


def test_the_same_files_by_the_way_of_sae_lens(tmp_path, x):
    """Through the loader that sae_lens uses for the release, but for the download."""
    from sae_lens import SAE

    path, arrays = gemma_scope(tmp_path / "layer_20" / "params")

    def converter(folder, device, cfg_overrides=None):
        config = {"architecture": "jumprelu", "d_in": D, "d_sae": LATENTS, "dtype": "float32", "device": device}
        config |= {"apply_b_dec_to_input": False, "normalize_activations": None, "hook_name": "blocks.20.hook_resid_post"}
        return config, {name: torch.tensor(array, dtype=torch.float32) for name, array in arrays.items()}

    reference = SAE.load_from_disk(path, converter=converter)
    assert_same(load_dictionary(path).encode(x), reference.encode(x).detach())


def test_checkpoints_of_the_mlsae_authors(tmp_path, x):
    """Their formulas, written out in numpy (arXiv 2409.04185, §1.3 of their code)."""
    rng = np.random.default_rng(3)
    encoder, decoder, bias = rng.normal(size=(LATENTS, D)), rng.normal(size=(D, LATENTS)), rng.normal(size=D)
    tensors = {"encoder.weight": encoder, "decoder.weight": decoder, "pre_encoder_bias": bias}
    save_file({name: torch.tensor(array, dtype=torch.float32) for name, array in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"k": K, "n_inputs": D, "n_latents": LATENTS, "standardize": True}))
    dictionary = load_dictionary(f"mlsae:{tmp_path}")
    rows = x.double().numpy()
    mean, std = rows.mean(-1, keepdims=True), rows.std(-1, keepdims=True, ddof=1)
    pre = ((rows - mean) / (std + 1e-5) - bias) @ encoder.T
    kept = pre >= np.sort(pre, -1)[..., -K, None]
    activations = np.maximum(pre * kept, 0)
    np.testing.assert_allclose(dictionary.encode(x).numpy(), activations, atol=2e-5)
    np.testing.assert_allclose(dictionary.decode(dictionary.encode(x), x).numpy(), (activations @ decoder.T + bias) * std + mean, atol=1e-4)


# ---- where they belong -----------------------------------------------------------------------------------------------------


def test_a_dictionary_trained_here_knows_its_model(tmp_path, model):
    info, site = describe(model), ResidualSite(2)
    make_sae("topk", metadata=origin(info, (site,))).save_model(tmp_path)
    dictionary = load_dictionary(tmp_path)
    assert dictionary.sites == (site,)
    dictionary.check_fits(info.fingerprint(), site)
    with pytest.raises(DictionaryError, match="trained at site 2, not at 1"):
        dictionary.check_fits(info.fingerprint(), ResidualSite(1))
    with pytest.raises(DictionaryError, match="with other weights"):
        dictionary.check_fits(info.fingerprint() | {"digest": "0" * 32}, site)
    with pytest.raises(DictionaryError, match="width 16; .* has 32"):
        dictionary.check_fits(info.fingerprint() | {"d_model": 32}, site)


def test_several_sites(tmp_path, model):
    info, sites = describe(model), (ResidualSite.EMBED, ResidualSite(0), ResidualSite(2))
    make_sae("topk", "layer_norm", metadata=origin(info, sites)).save_model(tmp_path)
    dictionary = load_dictionary(f"mlsae:{tmp_path}")
    assert dictionary.sites == sites
    with pytest.raises(DictionaryError, match="trained at sites embed, 0, 2, not at 1"):
        dictionary.check_fits(info.fingerprint(), ResidualSite(1))


def test_names_of_models_are_compared_without_owner(tmp_path, model):
    make_sae("standard", metadata={"model_name": "gemma-2-2b", "hook_name": "blocks.3.hook_resid_pre"}).save_model(tmp_path)
    dictionary = load_dictionary(tmp_path)
    fingerprint = describe(model).fingerprint()
    dictionary.check_fits(fingerprint | {"name": "google/gemma-2-2b"}, ResidualSite(2))
    dictionary.check_fits(fingerprint | {"name": str(tmp_path)}, ResidualSite(2))  # a folder may hold any model
    with pytest.raises(DictionaryError, match="trained on gemma-2-2b, not on google/gemma-2-2b-it"):
        dictionary.check_fits(fingerprint | {"name": "google/gemma-2-2b-it"}, ResidualSite(2))


def test_links_and_fingerprints(tmp_path):
    make_sae("standard", metadata={"neuronpedia_id": "gemma-2-2b/20-gemmascope-res-16k"}).save_model(tmp_path / "a")
    make_sae("standard").save_model(tmp_path / "b")
    make_sae("standard", "layer_norm").save_model(tmp_path / "c")
    first, second, third = (load_dictionary(tmp_path / name) for name in "abc")
    assert first.link(12) == "https://www.neuronpedia.org/gemma-2-2b/20-gemmascope-res-16k/12"
    assert second.link(12) is None
    assert first.fingerprint()["digest"] == second.fingerprint()["digest"] != third.fingerprint()["digest"]
    json.dumps(first.fingerprint())
    torch.testing.assert_close(torch.linalg.vector_norm(first.directions, dim=1), torch.ones(LATENTS, dtype=torch.float64))


# ---- what is refused -------------------------------------------------------------------------------------------------------


def test_what_is_not_there_or_not_understood(tmp_path, x):
    for reference in ("nothing", "./nothing/here", "mlsae:nothing/here", "~/nothing"):
        with pytest.raises(DictionaryError, match="no SAE"):
            load_dictionary(reference)
    with pytest.raises(DictionaryError, match="Valid IDs are"):
        load_dictionary("gemma-scope-2b-pt-res-canonical/layer_99/width_16k/canonical")
    (tmp_path / "cfg.json").write_text("{")
    with pytest.raises(DictionaryError, match=r"holds no SAE that sae_lens saved: .*cfg.json is damaged or no JSON file"):
        load_dictionary(tmp_path)
    make_sae("standard").save_model(tmp_path)
    (tmp_path / "sae_weights.safetensors").write_bytes(b"damaged")
    with pytest.raises(DictionaryError, match=r"holds no SAE that sae_lens saved: .*sae_weights.safetensors is damaged"):
        load_dictionary(tmp_path)
    with pytest.raises(DictionaryError, match="width 16, not 5"):
        load_dictionary_of("standard", tmp_path / "good").encode(x[..., :5])
    with pytest.raises(DictionaryError, match="only topk"):
        load_dictionary(tmp_path / "good").encode_sparse(x)


def load_dictionary_of(kind, folder, **more):
    make_sae(kind, **more).save_model(folder)
    return load_dictionary(folder)


@pytest.mark.parametrize("kind", ["jumprelu", "standard"])
def test_weights_that_do_not_fit_together(tmp_path, kind):
    dictionary = load_dictionary_of(kind, tmp_path)
    parts = {name: getattr(dictionary, name) for name in ("kind", "W_enc", "b_enc", "W_dec", "b_dec", "shift", "threshold")}
    Dictionary(**parts)
    with pytest.raises(DictionaryError, match="b_enc"):
        Dictionary(**parts | {"b_enc": dictionary.b_enc[:3]})
    with pytest.raises(DictionaryError, match="not finite"):
        Dictionary(**parts | {"b_dec": dictionary.b_dec / 0})
    with pytest.raises(DictionaryError, match="unknown kind"):
        Dictionary(**parts | {"kind": "swish"})
    if kind == "jumprelu":
        with pytest.raises(DictionaryError, match="threshold"):
            Dictionary(**parts | {"threshold": None})


def test_not_of_the_residual_stream(tmp_path):
    make_sae("standard", metadata={"hook_name": "blocks.3.hook_mlp_out"}).save_model(tmp_path)
    with pytest.raises(DictionaryError, match="not an SAE of the residual stream"):
        load_dictionary(tmp_path)
    make_sae("standard", "expected_average_only_in").save_model(tmp_path)
    with pytest.raises(DictionaryError, match="its inputs are transformed"):
        load_dictionary(tmp_path)


def test_hostile_archives_run_nothing(tmp_path):
    np.savez(tmp_path / "params.npz", W_enc=np.array([print], dtype=object), W_dec=np.zeros(1))
    with pytest.raises(DictionaryError, match="sae_lens cannot load"):
        load_dictionary(tmp_path / "params.npz")
