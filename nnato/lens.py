"""The tuned lens: what the residual of each layer says in the coordinates of the last one (arXiv 2303.08112).

The least-squares translator of a layer is the transport operator from there to the last block; shrunk to the identity, a large penalty
leaves the logit lens. It needs moments only. Training by KL goes on from there (`lens_training`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nnato.accumulation import Accumulated
from nnato.embedded import LOAD_ERRORS
from nnato.errors import FileFormatError, OperatorError, SiteError, first_line
from nnato.fitting import Fit, fit
from nnato.models import ModelInfo
from nnato.operators import AffineMap, TransportOperator, identity
from nnato.remote import UNPICKLING
from nnato.selection import Method
from nnato.sites import Pair, ResidualSite
from nnato.statistics import Progress
from nnato.storage import (
    atomic,
    check_zip,
    prepare_folder,
    read_artifact,
    read_json,
    require,
    require_entries,
    require_finite,
    write_artifact,
)

if TYPE_CHECKING:
    from nnato.nnsight_setup import TransformersModel

KIND = "lens"
FILE = "lens.safetensors"
METHOD = Method(shrink_to="identity")
"""Ridge, shrunk to the identity, with the penalty that does best on validation documents."""


@dataclass(frozen=True)
class Lens:
    """A translator from each of several sites to the output of the last block; the last block's own is the identity.

    Attributes:
        last: The last block.
        translators: By site, the map to the last block.
        model: Fingerprint of the model, as far as it is known.
        details: Where it comes from, in JSON.
    """

    last: ResidualSite
    translators: Mapping[ResidualSite, AffineMap] = field(repr=False)
    model: Mapping[str, Any] = field(default_factory=dict, repr=False)
    details: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def sites(self) -> tuple[ResidualSite, ...]:
        """Where it reads, the last block included."""
        return (*sorted(self.translators), self.last)

    @property
    def digest(self) -> str:
        """Fingerprint of its numbers."""
        digest = hashlib.blake2b(str(self.sites).encode(), digest_size=8)
        for site in sorted(self.translators):
            for tensor in self._tensors(site):
                digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def __call__(self, x: torch.Tensor, site: int | str | ResidualSite) -> torch.Tensor:
        """Residuals of a site, float (…, d_model), in the coordinates of the last block.

        Raises:
            SiteError: It has no translator for this site.
        """
        at = ResidualSite.parse(site)
        if at == self.last:
            return x
        if at not in self.translators:
            raise SiteError(f"the lens has no translator for site {at}; it has {', '.join(map(str, self.sites))}")
        return self.translators[at](x)

    def to_shared(self, x: torch.Tensor, sites: Sequence[ResidualSite]) -> torch.Tensor:
        """Residuals of several sites, float (sites, …, d_model), in the coordinates of the last block."""
        return torch.stack([self(rows, site) for rows, site in zip(x, sites, strict=True)])

    def check_fits(self, info: ModelInfo, sites: Iterable[ResidualSite]) -> None:
        """Refuse a lens of another model, or one that lacks a site.

        Raises:
            OperatorError: It is of another model.
            SiteError: It lacks a site.
        """
        widths = {translator.weight.shape[0] for translator in self.translators.values()}
        if self.last != info.blocks - 1 or widths - {info.d_model}:
            raise OperatorError(f"the lens is of a model of {self.last + 1} blocks; {info.name} has {info.blocks}, of width {info.d_model}")
        if "digest" in self.model and not info.fits(self.model):
            raise OperatorError(f"the lens was fitted on {self.model.get('name')} with other weights than {info.name} has here")
        if missing := set(sites) - set(self.sites):
            raise SiteError(f"the lens has no translator for site {min(missing)}; it has {', '.join(map(str, self.sites))}")

    def _tensors(self, site: ResidualSite) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        translator = self.translators[site]
        return translator.weight, translator.source_mean, translator.target_mean

    # ---- files -----------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write to `lens.safetensors` in a folder, atomically.

        Raises:
            OutputError: It cannot be written.
        """
        path = prepare_folder(Path(folder).expanduser()) / FILE
        tensors = {
            f"{site}.{name}": tensor
            for site in sorted(self.translators)
            for name, tensor in zip(("weight", "source_mean", "target_mean"), self._tensors(site), strict=True)
        }
        sites = [site.key for site in sorted(self.translators)]
        write_artifact(path, KIND, tensors, {"last": self.last.key, "sites": sites, "model": self.model, "details": self.details})
        return path

    @staticmethod
    def load(path: str | Path) -> Lens:
        """Read what `save` wrote: the file, or its folder. Executes nothing.

        Raises:
            FileFormatError: No such file, or not a readable lens.
        """
        path = Path(path).expanduser()
        path = path / FILE if path.is_dir() else path
        tensors, metadata = read_artifact(path, KIND)
        require_finite(tensors, path)
        require_entries(metadata, path, sites=list, model=dict, details=dict)
        try:
            last = ResidualSite.parse(metadata["last"])
            translators: dict[ResidualSite, AffineMap] = {}
            for key in metadata["sites"]:
                weight, source_mean, target_mean = (tensors[f"{key}.{name}"] for name in ("weight", "source_mean", "target_mean"))
                site = ResidualSite.parse(key)
                translators[site] = TransportOperator(site, last, weight, source_mean, target_mean, name="lens")
            require(len(tensors) == 3 * len(translators), path, "it holds tensors of other sites, or a site twice")
            return Lens(last, translators, metadata["model"], metadata["details"])
        except (KeyError, TypeError, SiteError, OperatorError) as error:
            raise FileFormatError(f"{path} is inconsistent ({type(error).__name__}: {error}); make it again") from None


def lens_pairs(blocks: int) -> tuple[Pair, ...]:
    """The pairs whose moments give a lens: from `embed` and each block to the last one."""
    last = ResidualSite(blocks - 1)
    return tuple((ResidualSite(site) if site >= 0 else ResidualSite.EMBED, last) for site in range(-1, blocks - 1))


def fit_lens(accumulated: Accumulated, *, method: Method = METHOD, progress: Progress | None = None) -> tuple[Lens, list[Fit]]:
    """Fit a lens in closed form, from moments of pairs that lead to the last block (`lens_pairs`).

    Args:
        accumulated: The moments.
        method: How each translator is fitted and chosen.
        progress: Told of each site.

    Returns:
        The lens, and of each translator its R² on test documents.

    Raises:
        MomentsError: The moments hold no pair that leads to the last block.
    """
    last = ResidualSite(accumulated.model["blocks"] - 1)
    pairs = tuple(pair for pair in accumulated.moments.pairs if pair[1] == last)
    if not pairs:
        raise OperatorError(f"the moments hold no pair to the last block {last}: accumulate with nnato lens fit, or --pairs embed:{last},…")
    fits = fit(accumulated, pairs, method=method, progress=progress)
    details = {"method": "closed form", "text": accumulated.text, "kappas": {str(one.operator.source): one.kappa for one in fits}}
    return Lens(last, {one.operator.source: one.operator for one in fits}, accumulated.model, details), fits


def logit_lens(blocks: int, d_model: int) -> Lens:
    """The lens that does nothing: every residual is read as if it were the last one."""
    zero = torch.zeros(d_model, dtype=torch.float64)
    return Lens(ResidualSite(blocks - 1), {pair[0]: identity(pair, zero, zero, "identity") for pair in lens_pairs(blocks)})


# ---- the format of the tuned-lens package ------------------------------------------------------------------------------------


def import_lens(path: str | Path, blocks: int, d_model: int) -> Lens:
    """Read a lens in the format of the tuned-lens package: a folder with `params.pt` and `config.json`. Executes nothing.

    Its translator i is for the input of block i: for the output of block i - 1, or for `embed` if i is 0. The output of the last block has
    none.

    Args:
        path: The folder.
        blocks: Blocks of the model it is for.
        d_model: Its width.

    Raises:
        FileFormatError: It is not readable, or of another model.
    """
    folder = Path(path).expanduser()
    try:
        config = read_json(folder / "config.json")
        check_zip(folder / "params.pt")
        state = torch.load(folder / "params.pt", map_location="cpu", weights_only=True)
        require_entries({"bias": True, **config}, folder, num_hidden_layers=int, d_model=int, bias=bool)
        shape = config["num_hidden_layers"], config["d_model"]
    except (*LOAD_ERRORS, TypeError, AttributeError, EOFError, UNPICKLING, FileFormatError) as error:
        raise FileFormatError(f"{folder} holds no lens with params.pt and config.json: {first_line(error)}") from None
    require(shape == (blocks, d_model), folder, f"it is of a model of {shape[0]} blocks and width {shape[1]}, not {blocks} and {d_model}")
    translators: dict[ResidualSite, AffineMap] = {}
    for number, pair in enumerate(lens_pairs(blocks)):
        weight = _entry(state, f"{number}.weight", (d_model, d_model), folder)
        bias = _entry(state, f"{number}.bias", (d_model,), folder) if config.get("bias", True) else torch.zeros(d_model).double()
        eye = torch.eye(d_model, dtype=torch.float64)
        translators[pair[0]] = TransportOperator(*pair, eye + weight.T, torch.zeros_like(bias), bias, name="lens")
    name = str(config.get("base_model_name_or_path", ""))
    return Lens(ResidualSite(blocks - 1), translators, {"name": name} if name else {}, {"method": "tuned-lens", "source": str(path)})


def _entry(state: Mapping[str, Any], name: str, shape: tuple[int, ...], folder: Path) -> torch.Tensor:
    tensor = state.get(name)
    fits = isinstance(tensor, torch.Tensor) and tensor.shape == shape and bool(torch.isfinite(tensor).all())
    require(fits, folder, f"its tensor {name} is missing, not finite, or not of shape {shape}")
    return tensor.double() if isinstance(tensor, torch.Tensor) else torch.empty(0)


def export_lens(lens: Lens, folder: str | Path, model: TransformersModel) -> Path:
    """Write a lens in the format of the tuned-lens package.

    Args:
        lens: The lens, with a translator for every site.
        folder: Where `params.pt` and `config.json` go.
        model: The model it is for.

    Raises:
        OperatorError: It lacks a site.
        OutputError: The folder cannot be written.
    """
    pairs = lens_pairs(int(lens.last) + 1)
    if missing := {pair[0] for pair in pairs} - set(lens.translators):
        raise OperatorError(f"the format needs a translator for every site, and the lens has none for {min(missing)}")
    state = {}
    for number, pair in enumerate(pairs):
        weight, source_mean, target_mean = lens._tensors(pair[0])
        state[f"{number}.weight"] = (weight - torch.eye(len(weight), dtype=torch.float64)).T.float().contiguous()
        state[f"{number}.bias"] = (target_mean - source_mean @ weight).float()
    unembedding = model._module.get_output_embeddings().weight.detach().float().cpu().numpy()
    config = {
        "base_model_name_or_path": model._module.config._name_or_path,
        "base_model_revision": None,
        "bias": True,
        "d_model": len(state["0.bias"]),
        "lens_type": "linear_tuned_lens",
        "num_hidden_layers": int(lens.last) + 1,
        "unembed_hash": hashlib.sha256(unembedding.data).hexdigest(),
    }
    folder = prepare_folder(Path(folder).expanduser())
    with atomic(folder / "params.pt") as temporary:
        torch.save(state, temporary)
    with atomic(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=1) + "\n")
    return folder
