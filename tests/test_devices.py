"""What can be known about GPUs without one: where tensors are, and how often the host waits for the device."""

from __future__ import annotations

import torch
from conftest import WIDTH
from test_multilayer import random_lens, random_sae
from torch.utils._python_dispatch import TorchDispatchMode

from nnato.dictionaries import Dictionary
from nnato.fidelity import backward_maps, fidelity
from nnato.moments import Moments, _add_products
from nnato.multilayer import MultiLayerSAE
from nnato.prompts import prompt_activity
from nnato.reduction import TokenClasses, capture
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
