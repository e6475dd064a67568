"""Sparse autoencoders as frozen data: encode, decode, and where they belong. sae_lens only loads them.

Weights are kept in the form in which they act: whatever a training recipe folds into its encoder (norms of the decoder, averages of
norms) is folded when the dictionary is loaded, so that encoding is one product and one non-linearity, on torch alone.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from nnato.coding import SparseCoder
from nnato.embedded import LOAD_ERRORS
from nnato.errors import DictionaryError, FileFormatError, SiteError, first_line
from nnato.models import ModelInfo
from nnato.sites import ResidualSite
from nnato.storage import check_weights, check_zip, read_json

KINDS = {"standard": "relu", "jumprelu": "jumprelu", "topk": "topk", "gated": "gated"}
"""Architectures of sae_lens, by our names. BatchTopK and its Matryoshka variant are saved as JumpReLU."""
SCALINGS = ("none", "layer_norm", "constant_norm_rescale")
"""What a dictionary does to each input by itself: nothing, standardise it, or give it the norm √d."""
NEURONPEDIA = "https://www.neuronpedia.org"
_NAMES = {"gpt2-small": "gpt2"}
"""Names of models in sae_lens that differ from those on the hub."""


@dataclass(frozen=True)
class Dictionary(SparseCoder):
    """A sparse autoencoder with what is known of where it belongs. Weights are those of `SparseCoder`, all float32.

    Attributes:
        sites: Where it was trained; more than one for a multi-layer SAE; empty if it does not say.
        model: Of the model it was trained on what is known: `name`, and for those that nnato trained its whole fingerprint.
        lens: Fingerprint of the lens behind which it was trained: it reads residuals of the last block only, or others through that lens.
        neuronpedia: Its id there, e.g. `gemma-2-2b/20-gemmascope-res-16k`.
        source: Where it was loaded from.
    """

    kind: str
    W_enc: torch.Tensor = field(repr=False)
    b_enc: torch.Tensor = field(repr=False)
    W_dec: torch.Tensor = field(repr=False)
    b_dec: torch.Tensor = field(repr=False)
    shift: torch.Tensor = field(repr=False)
    scaling: str = "none"
    threshold: torch.Tensor | None = field(default=None, repr=False)
    gain: torch.Tensor | None = field(default=None, repr=False)
    magnitude_bias: torch.Tensor | None = field(default=None, repr=False)
    k: int | None = None
    sites: tuple[ResidualSite, ...] = ()
    model: Mapping[str, Any] = field(default_factory=dict)
    lens: str | None = None
    neuronpedia: str | None = None
    source: str = ""

    def __post_init__(self) -> None:
        width, latents = self.W_enc.shape if self.W_enc.dim() == 2 else (0, 0)
        vectors = {"b_enc": latents, "b_dec": width, "shift": width}
        vectors |= dict.fromkeys(_EXTRA.get(self.kind, ()), latents)
        if self.kind not in KINDS.values() or self.scaling not in SCALINGS or (self.kind == "topk" and not 0 < (self.k or 0) <= latents):
            raise DictionaryError(f"{self}: unknown kind or scaling, or a k that is not among its {latents} latents")
        for name, tensor in self._tensors().items():
            if tensor.dtype != torch.float32 or not bool(torch.isfinite(tensor).all()):
                raise DictionaryError(f"{self}: {name} is not float32, or not finite")
        wrong = [name for name, size in vectors.items() if getattr(self, name) is None or getattr(self, name).shape != (size,)]
        if self.W_dec.shape != (latents, width) or wrong:
            raise DictionaryError(f"{self}: the shapes of its weights do not fit together ({', '.join(wrong) or 'W_dec'})")

    def __str__(self) -> str:
        return self.source or f"a {self.kind} dictionary"

    @property
    def directions(self) -> torch.Tensor:
        """Decoder rows of unit norm, float64 (latents, d_model); NaN for a row of zeros."""
        rows = self.W_dec.double()
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return rows / torch.where(norms > 0, norms, float("nan"))

    # ---- where it belongs ----------------------------------------------------------------------------------------------

    def check_fits(self, model: Mapping[str, Any], site: ResidualSite) -> None:
        """Refuse a dictionary of another model, width or site.

        Args:
            model: Fingerprint of a model (`ModelInfo.fingerprint`, `Accumulated.model`).
            site: Where it is to be used.

        Raises:
            DictionaryError: It does not belong there.
        """
        if self.d_model != model["d_model"]:
            raise DictionaryError(f"{self} is for residuals of width {self.d_model}; {model['name']} has {model['d_model']}")
        if self.sites and site not in self.sites:
            raise DictionaryError(
                f"{self} was trained at {'site' if len(self.sites) == 1 else 'sites'} {', '.join(map(str, self.sites))}, not at {site}"
            )
        if "digest" in self.model:
            if not ModelInfo(**model).fits(self.model):
                raise DictionaryError(f"{self} was trained on {self.model.get('name')} with other weights than {model['name']} has here")
        elif "name" in self.model and not Path(model["name"]).expanduser().exists() and _short(self.model["name"]) != _short(model["name"]):
            raise DictionaryError(f"{self} was trained on {self.model['name']}, not on {model['name']}")

    def link(self, latent: int) -> str | None:
        """Address of a latent on Neuronpedia; None if it is not there."""
        return None if self.neuronpedia is None else f"{NEURONPEDIA}/{self.neuronpedia}/{latent}"

    def fingerprint(self) -> dict[str, Any]:
        """What identifies it, in JSON: contents, not the name."""
        digest = hashlib.blake2b(json.dumps([self.kind, self.scaling, self.k]).encode(), digest_size=16)
        for name, tensor in self._tensors().items():
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return {
            "source": self.source,
            "kind": self.kind,
            "scaling": self.scaling,
            "latents": self.latents,
            "d_model": self.d_model,
            "sites": [site.key for site in self.sites],
            "model": dict(self.model),
            "neuronpedia": self.neuronpedia,
            "digest": digest.hexdigest(),
        }

    def to(self, device: torch.device | str) -> Dictionary:
        """The same on a device."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self._tensors().items()}
        return replace(self, **moved)

    def _tensors(self) -> dict[str, torch.Tensor]:
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


_EXTRA = {"jumprelu": ("threshold",), "gated": ("gain", "magnitude_bias")}


def origin(info: ModelInfo, sites: tuple[ResidualSite, ...]) -> dict[str, Any]:
    """What to put into the metadata of an SAE that is trained here, so that `load_dictionary` knows where it belongs.

    Args:
        info: The model.
        sites: Where it is trained.

    Returns:
        Attributes for sae_lens' `cfg.metadata`.
    """
    hook = {} if len(sites) > 1 or sites[0] < 0 else {"hook_name": f"blocks.{int(sites[0])}.hook_resid_post"}
    return {"model_name": info.name, "nnato_sites": [site.key for site in sites], "nnato_model": info.fingerprint(), **hook}


# ---- loading ---------------------------------------------------------------------------------------------------------------


def load_dictionary(reference: str | Path, device: torch.device | str = "cpu") -> Dictionary:
    """Load a sparse autoencoder.

    Args:
        reference: A folder that sae_lens saved (`cfg.json`, `sae_weights.safetensors`), the `params.npz` of a Gemma Scope SAE or a folder
            that holds one, `RELEASE/ID` as sae_lens lists them (`gemma-scope-2b-pt-res-canonical/layer_20/width_16k/canonical`), or
            `mlsae:PATH` for a multi-layer SAE: a folder of either sae_lens or the authors of arXiv 2409.04185.
        device: Where to put the weights.

    Returns:
        The dictionary, in float32.

    Raises:
        DictionaryError: It cannot be found or read, or is of a kind that is not supported.
    """
    text = str(reference)
    path = Path(text.removeprefix("mlsae:")).expanduser()
    if text.startswith("mlsae:") and (path / "model.safetensors").is_file():
        return _from_mlsae(path, text).to(device)
    if path.is_dir() and (path / "cfg.json").is_file():
        _check_files(path, text)
        return _from_sae_lens(text, lambda library: library.SAE.load_from_disk(path, dtype="float32")).to(device)
    if path.suffix == ".npz" or (path.is_dir() and (path / "params.npz").is_file()):
        file = path if path.suffix == ".npz" else path / "params.npz"
        _check_archive(file, text)
        return _from_sae_lens(text, lambda library: library.SAE.load_from_disk(file, dtype="float32", converter=_read_gemma_scope)).to(
            device
        )
    release, slash, identity = text.partition("/")
    if path.exists() or text.startswith(("mlsae:", ".", "/", "~")) or not slash or not identity:
        raise DictionaryError(
            f"no SAE {text!r}: give a folder with cfg.json and sae_weights.safetensors, a params.npz, or RELEASE/ID as sae_lens lists them"
        )
    return _from_sae_lens(text, lambda library: library.SAE.from_pretrained(release, identity)).to(device)


def _check_files(folder: Path, source: str) -> None:
    """What is checked of a folder before sae_lens reads it: real files, a small JSON object, and tensors of floating-point numbers."""
    try:
        read_json(folder / "cfg.json")
        check_weights(folder / "sae_weights.safetensors")
    except FileFormatError as error:
        raise DictionaryError(f"{source} holds no SAE that sae_lens saved: {error}") from None


def _check_archive(file: Path, source: str) -> None:
    try:
        check_zip(file)
    except FileFormatError as error:
        raise DictionaryError(f"{source} holds no SAE of Gemma Scope: {error}") from None


def _from_sae_lens(source: str, load: Any) -> Dictionary:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sae_lens and what it imports warn of things that nobody here can change
        import sae_lens

        try:
            return _converted(load(sae_lens), source)
        except (*LOAD_ERRORS, TypeError, AttributeError, OverflowError, MemoryError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DictionaryError(
                f"sae_lens cannot load {source!r}: {first_line(error)}. A trainer's checkpoint has to be saved for inference first; an SAE "
                "of the hub needs the network once"
            ) from None


_SETTINGS = {"rescale_acts_by_decoder_norm": False, "apply_b_dec_to_input": False, "k": 0}
"""Entries of sae_lens' configurations that change what an SAE does, with what they are if they are missing."""


def _converted(sae: Any, source: str) -> Dictionary:
    """A dictionary from an SAE of sae_lens, with everything folded that can be."""
    config, metadata = sae.cfg, sae.cfg.metadata
    kind = KINDS.get(config.architecture())
    if kind is None:
        raise DictionaryError(f"{source}: SAEs of architecture {config.architecture()!r} are not supported; {', '.join(KINDS)} are")
    if config.normalize_activations not in SCALINGS or config.reshape_activations != "none":
        raise DictionaryError(
            f"{source}: its inputs are transformed ({config.normalize_activations}, {config.reshape_activations}) by something that is not "
            "saved with it; fold that into its weights with sae_lens"
        )
    settings = {name: getattr(config, name, default) for name, default in _SETTINGS.items()}
    if wrong := [name for name, value in settings.items() if type(value) is not type(_SETTINGS[name])]:
        raise DictionaryError(f"{source}: {wrong[0]} {settings[wrong[0]]!r} is not a {type(_SETTINGS[wrong[0]]).__name__}")
    name = _metadata(metadata, "model_name", str, source)
    state = {name: tensor.detach().float() for name, tensor in sae.state_dict().items()}
    encoder, decoder, b_dec = state["W_enc"], state["W_dec"], state["b_dec"]
    bias = state["b_gate"] if kind == "gated" else state["b_enc"]
    if settings["rescale_acts_by_decoder_norm"]:
        norms = torch.linalg.vector_norm(decoder, dim=1)
        encoder, bias, decoder = encoder * norms, bias * norms, decoder / norms[:, None]
    return Dictionary(
        kind=kind,
        W_enc=encoder.contiguous(),
        b_enc=bias,
        W_dec=decoder.contiguous(),
        b_dec=b_dec,
        shift=b_dec if settings["apply_b_dec_to_input"] else torch.zeros_like(b_dec),
        scaling=config.normalize_activations,
        threshold=state.get("threshold"),
        gain=state["r_mag"].exp() if kind == "gated" else None,
        magnitude_bias=state.get("b_mag"),
        k=settings["k"] or None,
        sites=_sites_of(metadata, source),
        model=dict(_metadata(metadata, "nnato_model", dict, source) or ({"name": name} if name else {})),
        lens=_metadata(metadata, "nnato_lens", str, source),
        neuronpedia=_metadata(metadata, "neuronpedia_id", str, source),
        source=source,
    )


def _metadata(metadata: Any, name: str, kind: type, source: str) -> Any:
    """An entry of sae_lens' metadata, None if there is none."""
    value = metadata.get(name)
    if value is not None and type(value) is not kind:
        raise DictionaryError(f"{source}: {name} in its metadata is not a {kind.__name__}")
    return value


def _sites_of(metadata: Any, source: str) -> tuple[ResidualSite, ...]:
    try:
        if metadata.get("nnato_sites"):
            return tuple(ResidualSite.parse(site) for site in metadata["nnato_sites"])
        return (ResidualSite.parse(metadata["hook_name"]),) if metadata["hook_name"] else ()
    except SiteError as error:
        raise DictionaryError(f"{source} is not an SAE of the residual stream: {error}") from None


def _read_gemma_scope(
    file: str | Path, device: str, cfg_overrides: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A converter for sae_lens: the `params.npz` of a Gemma Scope SAE. Its path, if it is that of their repository, says what it is of."""
    with np.load(file, allow_pickle=False) as data:
        names = {"W_" + key[2:] if key.startswith("w_") else key: key for key in data}
        state = {key: torch.from_numpy(data[names[key]]).float() for key in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    place = Path(file).expanduser().absolute().as_posix()
    layer, repository = re.search(r"/layer_(\d+)/", place), re.search(r"/gemma-scope-(\w+)-(pt|it)-res/", place)
    config = {
        "architecture": "jumprelu",
        "d_in": state["W_enc"].shape[0],
        "d_sae": state["W_enc"].shape[1],
        "device": device,
        "apply_b_dec_to_input": False,
        "metadata": {
            "sae_lens_version": "6.0.0",
            "hook_name": layer and f"blocks.{layer[1]}.hook_resid_post",
            "model_name": repository and f"gemma-2-{repository[1]}" + ("-it" if repository[2] == "it" else ""),
        },
    }
    return config | dict(cfg_overrides or {}), state


def _from_mlsae(folder: Path, source: str) -> Dictionary:
    """A checkpoint of the authors of arXiv 2409.04185. It does not say of which model and layers it is."""
    try:
        config = read_json(folder / "config.json")
        check_weights(folder / "model.safetensors")
        if type(config["k"]) is not int or type(config.get("standardize", True)) is not bool:
            raise DictionaryError(f"{source}: k is no whole number, or standardize neither true nor false")
        state = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
        encoder, decoder, bias = state["encoder.weight"].T, state["decoder.weight"].T, state["pre_encoder_bias"]
        return Dictionary(
            kind="topk",
            W_enc=encoder.contiguous(),
            b_enc=encoder.new_zeros(encoder.shape[1]),
            W_dec=decoder.contiguous(),
            b_dec=bias,
            shift=bias,
            scaling="layer_norm" if config.get("standardize", True) else "none",
            k=config["k"],
            source=source,
        )
    except (*LOAD_ERRORS, TypeError, AttributeError, FileFormatError) as error:
        raise DictionaryError(f"{source} holds no readable multi-layer SAE: {first_line(error)}") from None


def _short(name: str) -> str:
    """A model's name without its owner, in lower case."""
    last = name.rstrip("/").rpartition("/")[2].lower()
    return _NAMES.get(last, last)
