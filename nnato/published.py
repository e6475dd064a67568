"""Published multi-layer SAEs (arXiv 2409.04185) in sae_lens' format, so that everyone who uses that can use them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from nnato.dictionaries import load_dictionary
from nnato.embedded import LOAD_ERRORS
from nnato.errors import DictionaryError, first_line
from nnato.sites import ResidualSite
from nnato.storage import atomic_folder, prepare_folder

FILES = ("config.json", "model.safetensors")


def import_mlsae(
    reference: str | Path, out: str | Path, *, model: str | None = None, sites: Sequence[int | str | ResidualSite] | None = None
) -> Path:
    """Convert a checkpoint of the authors.

    Args:
        reference: A folder with `config.json` and `model.safetensors`, or a hub id.
        out: Where it goes: `cfg.json` and `sae_weights.safetensors`, as sae_lens saves them.
        model: The model it was trained on; the checkpoint does not say.
        sites: The layers it was trained at; the checkpoint does not say.

    Raises:
        DictionaryError: It cannot be had or read.
        OutputError: `out` cannot be written.
    """
    folder = Path(reference).expanduser()
    if not (folder / FILES[1]).is_file():
        folder = _download(str(reference))
    dictionary = load_dictionary(f"mlsae:{folder}")
    out = prepare_folder(Path(out).expanduser())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what sae_lens imports
        from sae_lens import TopKSAE, TopKSAEConfig
    config = TopKSAEConfig(
        d_in=dictionary.d_model,
        d_sae=dictionary.latents,
        k=dictionary.k or 1,
        normalize_activations="layer_norm" if dictionary.scaling == "layer_norm" else "none",
        apply_b_dec_to_input=True,
        rescale_acts_by_decoder_norm=False,
    )
    config.metadata.model_name = model
    config.metadata.nnato_sites = [ResidualSite.parse(site).key for site in sites or ()]
    config.metadata.nnato_source = str(reference)
    sae = TopKSAE(config)
    with torch.no_grad():
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            getattr(sae, name).copy_(getattr(dictionary, name))
    with atomic_folder(out, "cfg.json") as scratch:
        sae.save_model(scratch)
    return out


def _download(reference: str) -> Path:
    from huggingface_hub import snapshot_download

    if reference.count("/") != 1 or reference.startswith((".", "/", "~")):
        raise DictionaryError(f"no multi-layer SAE {reference!r}: give a folder with {' and '.join(FILES)}, or a hub id owner/name")
    try:
        folder = Path(snapshot_download(reference, allow_patterns=list(FILES)))
    except LOAD_ERRORS as error:
        raise DictionaryError(f"cannot load {reference!r} from the hub: {first_line(error)}; check the id and the network") from None
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise DictionaryError(f"{reference!r} holds no {missing[0]}: it is no multi-layer SAE in the published format")
    return folder
