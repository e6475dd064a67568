"""Multi-layer SAEs: their codes, and what one pass over a text adds up."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from conftest import BLOCKS, WIDTH, hook_residuals
from safetensors.torch import save_file

from nnato.coding import standardise
from nnato.dictionaries import Dictionary, load_dictionary
from nnato.errors import DictionaryError, FileFormatError, MomentsError, OperatorError, SiteError
from nnato.layer_merging import merge_layer_shards
from nnato.layer_stats import LayerStats, Reconstruction, layer_distributions, layer_variance
from nnato.lens import Lens, logit_lens
from nnato.models import describe
from nnato.multilayer import MultiLayerSAE, layer_activity, load_layer_activity, load_multilayer
from nnato.operators import TransportOperator
from nnato.reduction import TokenClasses
from nnato.sae_training import Recipe, train_sae
from nnato.shards import Shard
from nnato.sites import ResidualSite
from nnato.storage import read_artifact, write_artifact

LATENTS, K = 64, 4


def random_weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    decoder = torch.nn.functional.normalize(torch.randn(LATENTS, WIDTH, generator=generator), dim=1)
    return torch.randn(WIDTH, LATENTS, generator=generator), decoder, torch.randn(WIDTH, generator=generator)


def random_sae(sites=range(BLOCKS), lens=None, seed=0):
    encoder, decoder, bias = random_weights(seed)
    zero = torch.zeros(LATENTS)
    dictionary = Dictionary("topk", encoder, zero, decoder, bias, bias, "layer_norm", k=K)
    return MultiLayerSAE(dictionary, tuple(map(ResidualSite, sites)), lens)


def random_lens(seed=1):
    generator = torch.Generator().manual_seed(seed)
    last = ResidualSite(BLOCKS - 1)
    maps = {}
    for site in [ResidualSite.EMBED, *map(ResidualSite, range(BLOCKS - 1))]:
        tensors = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((WIDTH, WIDTH), (WIDTH,), (WIDTH,))]
        maps[site] = TransportOperator(site, last, *tensors)
    return Lens(last, maps)


def authors_checkpoint(folder):
    encoder, decoder, bias = random_weights()
    folder.mkdir()
    keys = {"auxk": 8, "dead_steps_threshold": 76, "dead_threshold": 1e-3, "k": K, "n_inputs": WIDTH, "n_latents": LATENTS}
    (folder / "config.json").write_text(json.dumps({**keys, "standardize": True}))
    tensors = {"encoder.weight": encoder.T.contiguous(), "decoder.weight": decoder.T.contiguous(), "pre_encoder_bias": bias}
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_codes_are_those_of_the_definition():
    sae, (encoder, decoder, bias) = random_sae(), random_weights()
    x = torch.randn(BLOCKS, 30, WIDTH, generator=torch.Generator().manual_seed(3)) * 5 + 1
    values, latents = sae.encode(sae.shared(x))
    pre = ((standardise(x)[0] - bias) @ encoder).numpy()
    dense = np.where(pre >= np.sort(pre, axis=-1)[..., -K:][..., :1], pre, 0).clip(min=0)
    found = torch.zeros(BLOCKS, 30, LATENTS).scatter_(-1, latents, values).numpy()
    np.testing.assert_allclose(found, dense, atol=1e-5)
    assert ((found > 0).sum(-1) <= K).all()
    back = (torch.tensor(dense) @ decoder + bias) * x.std(-1, keepdim=True) + x.mean(-1, keepdim=True)
    torch.testing.assert_close(sae.decode(values, latents, x), back, atol=1e-4, rtol=1e-4)


def test_codes_of_other_kinds_are_those_of_dense_encoding(monkeypatch):
    encoder, decoder, bias = random_weights()
    zero = torch.zeros(LATENTS)
    dictionary = Dictionary("jumprelu", encoder, zero, decoder, bias, zero[:WIDTH], threshold=zero + 6)
    sae = MultiLayerSAE(dictionary, (ResidualSite(0), ResidualSite(1)))
    x = torch.randn(2, 33, WIDTH, generator=torch.Generator().manual_seed(3)) * 2
    monkeypatch.setattr("nnato.coding.CELLS", LATENTS * 10)  # portions of unequal width
    values, latents = sae.encode(x)
    found = torch.zeros(2, 33, LATENTS).scatter_add_(-1, latents, values)
    torch.testing.assert_close(found, dictionary.encode(x))
    torch.testing.assert_close(sae.decode(values, latents, x), dictionary.decode(dictionary.encode(x), x), atol=1e-4, rtol=1e-4)


def test_a_checkpoint_of_the_authors(tmp_path, model):
    """Against sae_lens with the same weights: activations equal, reconstructions to 1e-5."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens import TopKSAE, TopKSAEConfig

    encoder, decoder, bias = random_weights()
    theirs = TopKSAE(TopKSAEConfig(d_in=WIDTH, d_sae=LATENTS, k=K, normalize_activations="layer_norm", apply_b_dec_to_input=True))
    state = {"W_enc": encoder, "W_dec": decoder, "b_dec": bias, "b_enc": torch.zeros(LATENTS)}
    theirs.load_state_dict(state)
    sae = load_multilayer(f"mlsae:{authors_checkpoint(tmp_path / 'mlsae')}", describe(model))
    assert sae.sites == tuple(range(BLOCKS))
    x = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(1)) * 3
    with torch.no_grad():
        wanted = theirs.encode(x)
        back = theirs.decode(wanted)
    values, latents = sae.encode(x)
    found = torch.zeros(40, LATENTS).scatter_(-1, latents, values)
    assert torch.equal(found > 0, wanted > 0)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(sae.decode(values, latents, x), back, atol=1e-5, rtol=1e-5)


def test_streamed_statistics_are_those_of_hooks(any_model, corpus):
    """Ragged batches against one table of residuals of forward hooks."""
    sae = random_sae()
    blocks = corpus.tokenize(any_model.tokenizer)
    found = layer_activity(any_model, sae, blocks, batch_size=3)
    rows, medians = [], None
    test = blocks.only("test")
    for batch in test.plan(3):
        tokens = test.batch(batch)
        seen, _ = hook_residuals(any_model._module, tokens.ids)
        x = torch.stack([seen[site] for site in range(BLOCKS)])
        allowed = tokens.mask & ~tokens.special
        allowed[:, 0] = False
        norms = x.norm(dim=-1)
        medians = norms[:, allowed].median(dim=1).values if medians is None else medians
        rows.append(x[:, allowed & ~(norms > 10 * medians[:, None, None]).any(0)])
    x = torch.cat(rows, dim=1)
    values, latents = sae.encode(x)
    wanted = LayerStats(range(BLOCKS), LATENTS)
    wanted.add(values, latents)
    assert found.stats.tokens == wanted.tokens == x.shape[1]
    torch.testing.assert_close(found.stats.total, wanted.total, rtol=1e-3, atol=1e-2)
    assert layer_variance(found.stats).ratio == pytest.approx(layer_variance(wanted).ratio, rel=1e-3)
    back = sae.decode(values, latents, x).double().numpy()
    for number, row in enumerate(found.metrics()):
        residual = x[number].double().numpy()
        error = ((back[number] - residual) ** 2).sum()
        assert row["site"] == number
        assert row["fvu"].value == pytest.approx(error / ((residual - residual.mean(0)) ** 2).sum(), rel=1e-3)
        assert row["fvu_mlsae"] == pytest.approx(error / ((residual - residual.mean()) ** 2).sum(), rel=1e-3)
        assert row["mse"] == pytest.approx(error / residual.size, rel=1e-3)
        assert row["l0"] == pytest.approx(float((values[number] > 0).sum()) / x.shape[1], rel=1e-3)
        assert row["l1"] == pytest.approx(float(values[number].sum()) / x.shape[1], rel=1e-3)
        assert row["fvu"].low <= row["fvu"].value <= row["fvu"].high


def test_reconstruction_in_parts():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 100, 5, generator=rng) * 3 + 50
    error, values = torch.randn(2, 100, 5, generator=rng), torch.randn(2, 100, 3, generator=rng).relu()
    whole, parts = Reconstruction(2, 5), Reconstruction(2, 5)
    whole.add(x, error, values)
    for part in torch.arange(100).tensor_split([3, 20, 20, 50, 51, 90]):
        parts.add(x[:, part], error[:, part], values[:, part])
    assert parts.n == 100
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(getattr(parts, name), tensor, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(whole.joint_power, 100 * 5 * x.double().numpy().var(axis=(1, 2)), rtol=1e-10)


def test_the_result_is_kept_and_read_again(model, corpus, tmp_path):
    sae = random_sae()
    found = layer_activity(model, sae, corpus, out=tmp_path, batch_size=4)
    again = load_layer_activity(tmp_path, sae)
    assert torch.equal(again.stats.total, found.stats.total)
    assert [row["fvu"] for row in again.metrics()] == [row["fvu"] for row in found.metrics()]
    assert again.sites == found.sites
    resumed = layer_activity(model, sae, corpus, out=tmp_path, batch_size=4)
    assert torch.equal(resumed.stats.total, found.stats.total)
    with pytest.raises(MomentsError, match="another SAE"):
        load_layer_activity(tmp_path, random_sae(seed=1))
    with pytest.raises(MomentsError, match="holds layer-stats of another"):
        layer_activity(model, sae, corpus, out=tmp_path, batch_size=2)
    file = tmp_path / "layers.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(FileFormatError, match="damaged"):
        load_layer_activity(tmp_path, sae)


@pytest.fixture
def shards(model, corpus, tmp_path):
    """Runs some shards; the folder of each."""

    def run(count, numbers=None, sae=None, **how):
        folders = [tmp_path / f"{number}-of-{count}" for number in numbers or range(1, count + 1)]
        for folder in folders:
            shard = Shard.parse(folder.name.replace("-of-", "/"))
            layer_activity(model, sae or random_sae(), corpus, out=folder, shard=shard, **({"batch_size": 2} | how))
        return folders

    return run


@pytest.mark.parametrize("count", [1, 2, 5])
def test_merged_shards_equal_one_run(model, corpus, tmp_path, shards, count):
    sae = random_sae()
    whole = layer_activity(model, sae, corpus, out=tmp_path / "whole", batch_size=2)
    file = merge_layer_shards(shards(count)[::-1], tmp_path / "all")
    merged = load_layer_activity(tmp_path / "all", sae)
    assert (merged.model, merged.text, merged.sae, merged.split) == (whole.model, whole.text, whole.sae, whole.split)
    assert [fold.tokens for fold in merged.folds] == [fold.tokens for fold in whole.folds]
    for parts in zip(merged.folds + merged.reconstruction, whole.folds + whole.reconstruction, strict=True):
        for one, other in zip(*(part.tensors().values() for part in parts), strict=True):
            assert float((one - other).abs().max()) <= 1e-12 * float(other.abs().max())
    before = file.read_bytes()
    assert merge_layer_shards(shards(count), tmp_path / "all").read_bytes() == before  # it is there already
    stages = []
    again = layer_activity(model, sae, corpus, out=tmp_path / "all", batch_size=2, progress=lambda *stage: stages.append(stage))
    assert torch.equal(again.stats.total, merged.stats.total)
    assert [stage for stage in stages if stage[0] == "forward passes"] == [("forward passes", stages[-1][1], stages[-1][1])]


def test_shards_that_are_no_whole_are_refused(model, corpus, tmp_path, shards):
    one, two, three = shards(3)
    out = tmp_path / "all"
    for folders, message in [
        ([one, three], "1 of 3 shards are missing: 2/3"),
        ([one, two, two, three], "shard 2/3 is there twice"),
        ([one, *shards(2, [1])], "they share out a text differently"),
        ([], "no shards to merge"),
    ]:
        with pytest.raises(MomentsError, match=message):
            merge_layer_shards(folders, out)
    with pytest.raises(MomentsError, match="holds one of the shards: choose another --out"):
        merge_layer_shards([one, two, three], one)
    with pytest.raises(MomentsError, match="holds one shard of a text only"):
        load_layer_activity(one, random_sae())
    with pytest.raises(MomentsError, match=r"a shard needs a folder to keep it in \(out\)"):
        layer_activity(model, random_sae(), corpus, shard=Shard(1, 2))
    layer_activity(model, random_sae(seed=1), corpus, out=tmp_path / "other", shard=Shard(2, 3), batch_size=2)
    with pytest.raises(MomentsError, match=r"is a shard of another run than .*: the request differs \(sae: "):
        merge_layer_shards([one, tmp_path / "other", three], out)
    layer_activity(model, random_sae(), corpus, out=tmp_path / "whole", batch_size=2)
    with pytest.raises(MomentsError, match="holds a whole text, not a shard of one"):
        merge_layer_shards([one, tmp_path / "whole"], out)
    file = two / "layers.safetensors"
    tensors, metadata = read_artifact(file, "layer-stats")
    fold = next(iter(metadata["tokens"]))
    lacking = {name: tensor for name, tensor in tensors.items() if name != f"{fold}.total"}
    for stored, change, error, message in [
        (tensors, {"cursor": metadata["cursor"] - 1}, MomentsError, "is not finished"),
        (tensors, {"tokens": 3}, FileFormatError, "tokens is not a dict"),
        (tensors, {"sae": {"sites": ["x"]}}, FileFormatError, "is inconsistent"),
        (lacking, {}, MomentsError, "the stored layer statistics lack total"),
    ]:
        write_artifact(file, "layer-stats", stored, metadata | change)
        with pytest.raises(error, match=message):
            merge_layer_shards([one, two, three], out)
    assert not (out / "layers.safetensors").exists()


def test_the_lens_is_used(model, corpus):
    plain, nothing, seen = (
        layer_activity(model, random_sae(lens=lens), corpus, batch_size=4).stats
        for lens in (None, logit_lens(BLOCKS, WIDTH), random_lens())
    )
    torch.testing.assert_close(nothing.total, plain.total)
    assert not torch.allclose(seen.total[:, 0], plain.total[:, 0], rtol=0.1)
    torch.testing.assert_close(seen.total[:, -1], plain.total[:, -1])  # of the last layer it is the identity


def test_subsets_of_layers_are_called_by_their_numbers(model, corpus):
    whole = layer_activity(model, random_sae(), corpus, batch_size=4)
    some = layer_activity(model, random_sae(sites=(1, 3)), corpus, batch_size=4)
    assert some.stats.layers == (1, 3)
    assert [row["site"] for row in some.metrics()] == [1, 3]
    assert some.stats.tokens >= whole.stats.tokens  # a sink at another layer does not count


def test_an_sae_of_one_layer_read_at_all_of_them(model, corpus, tmp_path):
    """It has the same statistics as one of all layers, and they are those of its codes at each."""
    recipe = Recipe(expansion=2, k=4, tokens=600, rows=64, buffer=256)
    train_sae(model, [2], recipe, out=tmp_path, corpus=corpus)
    info = describe(model)
    assert load_multilayer(tmp_path, info).sites == (2,)
    sae = load_multilayer(tmp_path, info, range(BLOCKS))
    activity = layer_activity(model, sae, corpus, batch_size=4)
    other = layer_activity(model, random_sae(), corpus, batch_size=4)
    assert activity.stats.layers == other.stats.layers
    assert activity.stats.tokens == other.stats.tokens
    assert [row.keys() for row in activity.metrics()] == [row.keys() for row in other.metrics()]
    assert layer_distributions(activity.stats).keys() == layer_distributions(other.stats).keys()
    assert 0 <= layer_variance(activity.stats).share <= 1
    dictionary, wanted = load_dictionary(tmp_path), torch.zeros(2 * WIDTH, BLOCKS, dtype=torch.float64)
    blocks, classes = corpus.tokenize(model.tokenizer).only("test"), TokenClasses()
    for rows in blocks.plan(4):
        tokens = blocks.batch(rows)
        seen, _ = hook_residuals(model._module, tokens.ids)
        residuals = torch.stack([seen[site] for site in range(BLOCKS)])
        ordinary = classes.ordinary(tokens.ids, tokens.mask, tokens.special, residuals)
        for site in range(BLOCKS):
            wanted[:, site] += dictionary.encode(residuals[site][ordinary]).double().sum(0)
    torch.testing.assert_close(activity.stats.total, wanted, rtol=1e-4, atol=1e-3)


def test_what_does_not_fit_is_refused(model, tmp_path):
    info = describe(model)
    folder = authors_checkpoint(tmp_path / "mlsae")
    with pytest.raises(SiteError, match="site 9 does not exist"):
        load_multilayer(f"mlsae:{folder}", info, [1, 9])
    with pytest.raises(OperatorError, match="the lens is of a model of 7 blocks"):
        load_multilayer(f"mlsae:{folder}", info, lens=logit_lens(7, WIDTH))
    with pytest.raises(DictionaryError, match="width"):
        encoder, decoder, bias = (torch.randn(3, 5), torch.randn(5, 3), torch.randn(3))
        wide = Dictionary("topk", encoder, torch.zeros(5), decoder, bias, bias, k=2)
        MultiLayerSAE(wide, (ResidualSite(0),)).check_fits(info)
