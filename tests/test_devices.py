"""What can be known about GPUs without one: where tensors are, and how often the host waits for the device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import dispatch_model
from conftest import BLOCKS, WIDTH, make_module, make_operator
from test_multilayer import random_lens, random_sae
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nnato.dictionaries import Dictionary
from nnato.errors import ModelError
from nnato.fidelity import backward_maps, fidelity
from nnato.models import load_model, wrap
from nnato.moments import Moments, _add_products
from nnato.multilayer import MultiLayerSAE
from nnato.perplexity import ablate
from nnato.prompts import prompt_activity
from nnato.reduction import TokenClasses, capture, stacked
from nnato.sites import ResidualSite, grid
from nnato.statistics import ResidualBatch
from nnato.steering import _addition, _reconstruction, steer
from nnato.top_examples import top_examples
from nnato.transport_moments import TransportMoments


def test_sums_never_leave_their_device():
    """On the meta device an operation that mixes devices, or that reads a value, fails."""
    pair = ResidualSite(0), ResidualSite(1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows = torch.empty(2, 7, WIDTH, dtype=dtype, device="meta")
        moments = Moments.of_pairs([pair], WIDTH, "meta")
        x, mean = moments._centred(rows, 0, 7)
        _add_products(moments.scatter[0], x[0], x[0], symmetric=True)
        _add_products(moments.scatter[1], x[0], x[1], symmetric=False)
        assert {tensor.device.type for tensor in (x, mean, moments.scatter, moments.mean)} == {"meta"}
        assert {tensor.dtype for tensor in (x, mean, moments.scatter, moments.mean)} == {torch.float64}


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: values read, and shapes that depend on values."""

    WAITING = ("_local_scalar_dense", "nonzero", "index.Tensor", "masked_select")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        mask = "index.Tensor" in name and any(getattr(index, "dtype", None) == torch.bool for index in args[1] if index is not None)
        self.count += mask or ("index.Tensor" not in name and any(part in name for part in self.WAITING))
        return function(*args, **(kwargs or {}))


def test_the_host_waits_a_fixed_number_of_times_for_a_batch(model):
    """It does not grow with sites, pairs or tokens: nothing is moved or decided pair by pair."""

    def waits(sites, shape):
        ids = torch.randint(4, 90, shape, generator=torch.Generator().manual_seed(0))
        special = torch.zeros_like(ids, dtype=torch.bool)
        moments, classes = TransportMoments(grid(map(ResidualSite, range(sites))), WIDTH), TokenClasses()
        residuals = capture(model, ids, moments.sites)
        for _ in range(2):  # medians come with the first batch; the second counts
            with Waits() as mode:
                ordinary = classes.ordinary(ids, ~special, special, residuals)
                batch = ResidualBatch(residuals, moments.sites, ordinary, ~ordinary, torch.arange(len(ids)), "train", 0)
                moments.update(batch)
        return mode.count

    few = waits(2, (2, 8))
    assert few == waits(4, (2, 8)) == waits(2, (6, 32))
    assert 0 < few <= 24


def test_latents_are_encoded_and_added_where_the_residuals_are(monkeypatch):
    """On the meta device, where an operation that mixes devices fails."""
    monkeypatch.setattr(Dictionary, "__post_init__", lambda self: None)  # it reads values, which that device has not
    dictionary = random_sae().dictionary.to("meta")
    sae, x = MultiLayerSAE(dictionary, (ResidualSite(0),), random_lens()), torch.empty(2, 5, WIDTH, device="meta")
    way = sae.lens.translators[ResidualSite(0)]
    for back in (None, way):
        for change in (_reconstruction(sae, ResidualSite(0), back), _addition(sae, ResidualSite(0), back, 3, 2.0)):
            assert change(x).device.type == "meta"
            assert change(x).shape == x.shape


def test_every_reading_of_an_sae_begins_with_moving_it_to_the_model(model, corpus, monkeypatch):
    moved, beside = [], MultiLayerSAE.beside
    monkeypatch.setattr(MultiLayerSAE, "beside", lambda self, model: moved.append(self) or beside(self, model))
    sae = random_sae()
    steer(model, sae, "w3 w5", 3, 0)
    prompt_activity(model, sae, "w3 w5 w7")
    fidelity(model, sae, corpus, sequences=1)
    top_examples(model, sae, corpus, count=1)
    backward_maps(model, random_sae(lens=random_lens()), corpus)
    assert len(moved) == 5


def test_residuals_of_a_spread_model_come_together_where_its_first_weights_are():
    """Two GPUs that only exist as fake tensors, which refuse to be mixed as real ones do."""
    with FakeTensorMode():
        places = {0: "cuda:1", 1: "cuda:1", 2: "cuda:0"}
        trace = SimpleNamespace(residual=lambda site: torch.empty(1, 5, WIDTH, device=places[site]))
        with pytest.raises(RuntimeError, match="same device"):
            torch.stack([trace.residual(site) for site in places])
        for first, want in (("cuda:0", "cuda:0"), ("meta", "cuda:1")):  # of a model without weights, nobody knows where they are
            model = SimpleNamespace(_module=SimpleNamespace(parameters=lambda first=first: iter([torch.empty(1, device=first)])))
            both = stacked(model, trace, places)
            assert both.shape == (3, 1, 5, WIDTH)
            assert both.device == torch.device(want)


def test_a_model_that_accelerate_runs_is_traced_and_edited_alike(tokenizer, corpus):
    """Accelerate's hooks around every block, as `device="auto"` makes them on several GPUs; here all of them are the CPU."""
    ids = torch.randint(5, 40, (2, 8), generator=torch.Generator().manual_seed(0))
    whole, module = wrap(make_module("gemma2"), tokenizer), make_module("gemma2")
    layers = {f"model.layers.{number}": "cpu" for number in range(BLOCKS)}
    rest = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    spread = wrap(dispatch_model(module, {**layers, **rest}, force_hooks=True), tokenizer)
    assert hasattr(module.model.layers[1], "_hf_hook")
    sites = [ResidualSite(0), ResidualSite(BLOCKS - 1)]
    assert torch.equal(capture(spread, ids, sites), capture(whole, ids, sites))
    operator = make_operator(0, 2)
    one, other = (ablate(model, [operator], corpus, positions=2, sequences=3)[0] for model in (whole, spread))
    assert one.to_json() == other.to_json()


def test_weights_are_spread_by_accelerate_or_refused(saved_model, monkeypatch):
    model = load_model(str(saved_model), device="auto")
    assert {parameter.device.type for parameter in model._module.parameters()} <= {"cpu", "cuda"}
    whole = load_model(str(saved_model), device="cpu")
    ids = torch.randint(5, 40, (1, 8), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(capture(model, ids, [ResidualSite(1)]).cpu(), capture(whole, ids, [ResidualSite(1)]), atol=1e-6)
    monkeypatch.setattr("nnato.models._device_map", lambda device: {"": "meta"})
    with pytest.raises(ModelError, match="does not fit on the GPUs"):
        load_model(str(saved_model), device="auto")
