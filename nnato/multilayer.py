"""One dictionary for all layers (arXiv 2409.04185): loading it, its sparse codes, and what it makes of a text, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nnato.accumulation import tokenize
from nnato.corpus import SPLITS, Corpus, TokenBlocks
from nnato.dictionaries import Dictionary, load_dictionary
from nnato.errors import DictionaryError, FileFormatError, MomentsError, SiteError
from nnato.intervals import Interval, share_explained
from nnato.layer_stats import LayerStats, merged
from nnato.lens import FILE as LENS_FILE
from nnato.lens import Lens
from nnato.models import ModelInfo, describe
from nnato.reduction import SINK_RATIO
from nnato.sites import ResidualSite
from nnato.statistics import Progress, ResidualBatch
from nnato.storage import SCHEMA, prepare_folder, read_artifact, require, require_entries
from nnato.streaming import stream

if TYPE_CHECKING:
    from nnato.nnsight_setup import TransformersModel

KIND = "layer-stats"
FILE = "layers.safetensors"
TOKENS = 100_000
"""Tokens of all splits in the default text, of two blocks per document."""
CELLS = 1 << 24
"""Pre-activations held at once: rows are encoded in portions."""


@dataclass(frozen=True)
class MultiLayerSAE:
    """A dictionary that is read at several layers.

    Attributes:
        dictionary: The dictionary.
        sites: The layers.
        lens: Carries residuals to where the dictionary was trained; None if it was trained on them as they are.
    """

    dictionary: Dictionary = field(repr=False)
    sites: tuple[ResidualSite, ...]
    lens: Lens | None = field(default=None, repr=False)

    @property
    def latents(self) -> int:
        """Number of latents."""
        return self.dictionary.latents

    def shared(self, x: torch.Tensor, sites: Sequence[ResidualSite] | None = None) -> torch.Tensor:
        """Residuals where the dictionary reads them.

        Args:
            x: Float (sites, …, d_model).
            sites: Whose they are; all by default.

        Returns:
            float32 (sites, …, d_model).
        """
        return x.float() if self.lens is None else self.lens.to_shared(x.float(), sites or self.sites)

    def encode(self, shared: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sparse codes of what `shared` returned, float (…, d_model).

        Returns:
            Activations, float32 (…, k), some of which may be zero, and their latents, int64 (…, k). k is that of a TopK dictionary, for
            others the largest number of active latents.
        """
        rows = shared.reshape(-1, shared.shape[-1])
        values, latents = [], []
        for part in torch.split(rows, max(CELLS // self.latents, 1)):
            found = self.dictionary.encode_sparse(part) if self.dictionary.kind == "topk" else _sparse(self.dictionary.encode(part))
            values.append(found[0])
            latents.append(found[1])
        width = max((one.shape[1] for one in values), default=1)
        shape = (*shared.shape[:-1], width)
        return (
            torch.cat([_padded(one, width) for one in values]).reshape(shape),
            torch.cat([_padded(one, width) for one in latents]).reshape(shape),
        )

    def decode(self, values: torch.Tensor, latents: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        """Reconstructions in the space of `shared`, float32 (…, d_model), from codes as `encode` gives them."""
        return self.dictionary.decode_sparse(values, latents, shared)

    def check_fits(self, info: ModelInfo) -> None:
        """Refuse it for another model.

        Raises:
            DictionaryError: The dictionary is of another model or width.
            SiteError: A site does not exist.
            OperatorError: The lens is of another model.
        """
        for site in self.sites:
            ResidualSite.parse(site, info.blocks)
        # An SAE of one layer may be read at all of them, to compare with; so only model and width have to fit.
        self.dictionary.check_fits(info.fingerprint(), self.dictionary.sites[0] if self.dictionary.sites else self.sites[0])
        if self.lens is not None:
            self.lens.check_fits(info, self.sites)

    def fingerprint(self) -> dict[str, Any]:
        """What identifies it, in JSON."""
        sites = [site.key for site in self.sites]
        return {"dictionary": self.dictionary.fingerprint(), "sites": sites, "lens": None if self.lens is None else self.lens.digest}


def _sparse(dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest activations of each row, as many as the busiest row has."""
    width = max(int((dense > 0).sum(-1).max()) if len(dense) else 1, 1)
    values, latents = torch.topk(dense, width, dim=-1, sorted=False)
    return values, latents


def _padded(found: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(found, (0, width - found.shape[1]))


def load_multilayer(
    reference: str | Path,
    info: ModelInfo,
    sites: Sequence[int | str | ResidualSite] | None = None,
    lens: Lens | None = None,
) -> MultiLayerSAE:
    """Load a multi-layer SAE, or an SAE of one layer to be read at several.

    Args:
        reference: As in `load_dictionary`: a folder of `nnato mlsae train` or of the authors, or any other SAE.
        info: The model it is read with.
        sites: Layers; by default those it was trained at, or all blocks if it does not say.
        lens: Carries residuals to the last layer first; by default the one in its folder, if it was trained with one.

    Raises:
        DictionaryError: It cannot be read, or is of another model, or the lens it was trained with is missing.
        SiteError: A site does not exist.
    """
    dictionary = load_dictionary(reference)
    chosen = dictionary.sites if sites is None else tuple(sorted({ResidualSite.parse(site, info.blocks) for site in sites}))
    folder = Path(str(reference).removeprefix("mlsae:")).expanduser()
    if lens is None and (folder / LENS_FILE).is_file():
        lens = Lens.load(folder)
    if dictionary.lens is not None and (lens is None or lens.digest != dictionary.lens):
        raise DictionaryError(f"{dictionary} was trained behind a lens: give that one, since nothing else fits it")
    sae = MultiLayerSAE(dictionary, chosen or tuple(map(ResidualSite, range(info.blocks))), lens)
    sae.check_fits(info)
    return sae


# ---- one pass over a text ----------------------------------------------------------------------------------------------------


class Reconstruction:
    """Sums that give, layer by layer, how well residuals are reconstructed; additive.

    Attributes:
        n: Tokens.
        mean: Of the residuals, float64 (layers, d_model).
        power: Their squared deviations from it, by coordinate, float64 (layers, d_model).
        errors: Squared errors, float64 (layers,).
        active: Active latents, float64 (layers,).
        strength: Σ of activations, float64 (layers,).
    """

    def __init__(self, layers: int, d_model: int, device: torch.device | str = "cpu") -> None:
        self.n = 0
        self.mean, self.power = (torch.zeros(layers, d_model, dtype=torch.float64, device=device) for _ in range(2))
        self.errors, self.active, self.strength = (torch.zeros(layers, dtype=torch.float64, device=device) for _ in range(3))

    def add(self, x: torch.Tensor, error: torch.Tensor, values: torch.Tensor) -> None:
        """Add tokens: residuals and errors, float (layers, n, d_model), and activations, float (layers, n, k)."""
        if not x.shape[1]:
            return
        part = Reconstruction(self.mean.shape[0], self.mean.shape[1], self.mean.device)
        rows = x.double()
        part.n = rows.shape[1]
        part.mean = rows.mean(1)
        part.power = (rows - part.mean[:, None]).square().sum(1)
        part.errors = error.double().square().sum((1, 2))
        part.active = (values > 0).sum((1, 2)).double()
        part.strength = values.double().sum((1, 2))
        whole = self.merge(part)
        self.__dict__.update(whole.__dict__)

    def merge(self, other: Reconstruction) -> Reconstruction:
        """The sums over both sets of tokens (Chan's formula)."""
        whole = Reconstruction(self.mean.shape[0], self.mean.shape[1], self.mean.device)
        whole.n = self.n + other.n
        share = other.n / max(whole.n, 1)
        step = other.mean - self.mean
        whole.mean = self.mean + share * step
        whole.power = self.power + other.power + self.n * share * step.square()
        for name in ("errors", "active", "strength"):
            setattr(whole, name, getattr(self, name) + getattr(other, name))
        return whole

    @property
    def joint_power(self) -> torch.Tensor:
        """Squared deviations from the mean over tokens *and* coordinates, as the authors take them; float64 (layers,)."""
        return self.power.sum(1) + self.n * (self.mean - self.mean.mean(1, keepdim=True)).square().sum(1)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All sums by name."""
        return {name: getattr(self, name) for name in ("mean", "power", "errors", "active", "strength")}


class LayerStatistic:
    """A `statistics.Statistic`: layer statistics and reconstruction of a multi-layer SAE, by fold.

    Args:
        sae: The SAE.
        d_model: Width of the residual stream.

    Attributes:
        sites: The layers.
        folds: Layer statistics by fold.
        errors: Reconstruction by fold, in the space where the dictionary reads.
    """

    def __init__(self, sae: MultiLayerSAE, d_model: int) -> None:
        self.sae, self.d_model, self.sites = sae, d_model, sae.sites
        self.folds: dict[int, LayerStats] = {}
        self.errors: dict[int, Reconstruction] = {}

    def update(self, batch: ResidualBatch) -> None:
        """Add a batch's ordinary tokens.

        Raises:
            NonFinite: With the place; nothing was added.
        """
        batch.check_finite()
        shared = self.sae.shared(batch.residuals[:, batch.ordinary])
        values, latents = self.sae.encode(shared)
        error = self.sae.decode(values, latents, shared) - shared
        stats, errors = self._fold(batch.fold)
        stats.add(values, latents)
        errors.add(shared, error, values)

    def _fold(self, fold: int) -> tuple[LayerStats, Reconstruction]:
        if fold not in self.folds:
            self.folds[fold] = LayerStats(self.sites, self.sae.latents)
            self.errors[fold] = Reconstruction(len(self.sites), self.d_model)
        return self.folds[fold], self.errors[fold]

    def state(self) -> tuple[Mapping[str, torch.Tensor], dict[str, Any]]:
        """Tensors and JSON of all sums."""
        tensors = {f"{fold}.{name}": tensor for fold, stats in self.folds.items() for name, tensor in stats.tensors().items()}
        tensors |= {f"{fold}.errors.{name}": tensor for fold, sums in self.errors.items() for name, tensor in sums.tensors().items()}
        counts = {str(fold): stats.tokens for fold, stats in self.folds.items()}
        return tensors, {"sae": self.sae.fingerprint(), "d_model": self.d_model, "tokens": counts}

    def restore(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
        """Take over a stored state of the same SAE.

        Raises:
            MomentsError: It does not fit.
        """
        fresh = LayerStatistic(self.sae, self.d_model)
        if metadata.get("sae", {}).get("dictionary", {}).get("digest") != self.sae.dictionary.fingerprint()["digest"]:
            raise MomentsError("the stored layer statistics are of another SAE")
        for key, count in metadata["tokens"].items():
            stats, errors = fresh._fold(int(key))
            stats.take(count, {name: tensors[f"{key}.{name}"] for name in stats.tensors() if f"{key}.{name}" in tensors})
            for name, mine in errors.tensors().items():
                stored = tensors.get(f"{key}.errors.{name}")
                fits = stored is not None and stored.shape == mine.shape and stored.dtype == mine.dtype
                if stored is None or not fits or not bool(torch.isfinite(stored).all()):
                    raise MomentsError(f"the stored layer statistics lack {key}.errors.{name}, or it has another shape, or is not finite")
                mine.copy_(stored)
            errors.n = count
        self.folds, self.errors = fresh.folds, fresh.errors


@dataclass(frozen=True)
class LayerActivity:
    """What a multi-layer SAE makes of a text.

    Attributes:
        sites: The layers.
        folds: Layer statistics of each fold of documents.
        reconstruction: Of each fold.
        model: Fingerprint of the model.
        text: Fingerprint of the text.
        sae: Fingerprint of the SAE.
        split: Which documents were read.
    """

    sites: tuple[ResidualSite, ...]
    folds: tuple[LayerStats, ...]
    reconstruction: tuple[Reconstruction, ...] = field(repr=False)
    model: dict[str, Any] = field(repr=False)
    text: dict[str, Any] = field(repr=False)
    sae: dict[str, Any] = field(repr=False)
    split: str = "test"

    @property
    def stats(self) -> LayerStats:
        """All folds together."""
        return merged(self.folds)

    def metrics(self) -> list[dict[str, Any]]:
        """How well each layer is reconstructed, where the dictionary reads (so behind a lens).

        Returns:
            By layer: `site`; `fvu`, an `Interval`: errors over squared deviations from the mean of each coordinate; `fvu_mlsae`: over those
            from one mean of all coordinates, as the authors take it, which is smaller; `mse`; `l0`; `l1`.
        """
        whole = self.reconstruction[0]
        for part in self.reconstruction[1:]:
            whole = whole.merge(part)
        joint, rows = whole.joint_power, []
        for number, site in enumerate(self.sites):
            errors = torch.stack([part.errors[number] for part in self.reconstruction])
            powers = torch.stack([part.power[number].sum() for part in self.reconstruction])
            power = float(whole.power[number].sum())
            # Deviations are from the mean of all folds: what folds lack of that is spread over them by their tokens.
            shares = torch.tensor([part.n / whole.n for part in self.reconstruction], dtype=torch.float64)
            explained = share_explained(errors, powers + shares * (power - powers.sum()))
            rows.append(
                {
                    "site": site.key,
                    "fvu": Interval(1 - explained.value, 1 - explained.high, 1 - explained.low),
                    "fvu_mlsae": float(whole.errors[number]) / float(joint[number]) if joint[number] > 0 else math.nan,
                    "mse": float(whole.errors[number]) / (whole.n * whole.mean.shape[1]),
                    "l0": float(whole.active[number]) / whole.n,
                    "l1": float(whole.strength[number]) / whole.n,
                }
            )
        return rows


def layer_activity(
    model: TransformersModel,
    sae: MultiLayerSAE,
    corpus: Corpus | TokenBlocks | None = None,
    *,
    split: str = "test",
    out: str | Path | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> LayerActivity:
    """Stream documents through a model once and add up what a multi-layer SAE makes of each layer; memory does not grow with the text.

    Args:
        model: The model.
        sae: The SAE.
        corpus: The text, tokenised already or not; by default so much of the embedded one.
        split: Which documents are read.
        out: A folder for checkpoints and the result; the same call resumes.
        batch_size: Token blocks per forward pass; also what the published numbers take for a batch.
        progress: Told of tokens read and batches done.

    Raises:
        DictionaryError: The SAE is of another model.
        TextError: The text cannot be read or is too short.
        MomentsError: `out` holds statistics of another request.
        ActivationError: A residual is not finite.
        OutputError: `out` cannot be written.
    """
    info = describe(model)
    sae.check_fits(info)
    file = None if out is None else prepare_folder(Path(out).expanduser()) / FILE
    blocks = tokenize(model, corpus or Corpus(tokens=TOKENS), progress).only(split)
    device = next(model._module.parameters()).device
    statistic = LayerStatistic(MultiLayerSAE(sae.dictionary.to(device), sae.sites, sae.lens), info.d_model)
    request = {
        "schema": SCHEMA,
        "model": {**info.contents(), "config": info.config},
        "text": {"digest": blocks.fingerprint["digest"], "context": blocks.context, "split": split},
        "sae": {**sae.fingerprint(), "dictionary": sae.dictionary.fingerprint()["digest"]},
        "batch_size": batch_size,
        "sink_ratio": SINK_RATIO,
    }
    about = {"model": info.fingerprint(), "text": blocks.fingerprint, "split": split}
    stream(model, blocks, statistic, request, about, file=file, kind=KIND, batch_size=batch_size, progress=progress)
    return _activity(statistic, {**about, "sae": sae.fingerprint()})


def load_layer_activity(path: str | Path, sae: MultiLayerSAE) -> LayerActivity:
    """Read what `layer_activity` wrote for an SAE: the file, or its folder.

    Raises:
        FileFormatError: No such file, or not a readable one of this kind.
        MomentsError: It is of another SAE.
    """
    file = Path(path).expanduser()
    file = file / FILE if file.is_dir() else file
    tensors, metadata = read_artifact(file, KIND)
    require_entries(metadata, file, d_model=int, sae=dict, tokens=dict, model=dict, text=dict, split=str)
    require(
        metadata["d_model"] == sae.dictionary.d_model and len(metadata["tokens"]) > 0, file, "it is of another width, or holds no tokens"
    )
    require(metadata["split"] in SPLITS, file, f"split {metadata['split']!r} is none of {', '.join(SPLITS)}")
    try:
        statistic = LayerStatistic(sae, metadata["d_model"])
        statistic.restore(tensors, metadata)
        return _activity(statistic, metadata)
    except (KeyError, TypeError, ValueError, AttributeError, SiteError, DictionaryError) as error:
        raise FileFormatError(f"{file} is inconsistent ({type(error).__name__}: {error}); make it again") from None


def _activity(statistic: LayerStatistic, metadata: Mapping[str, Any]) -> LayerActivity:
    folds = sorted(statistic.folds)
    return LayerActivity(
        statistic.sites,
        tuple(statistic.folds[fold] for fold in folds),
        tuple(statistic.errors[fold] for fold in folds),
        metadata["model"],
        metadata["text"],
        metadata["sae"],
        metadata["split"],
    )
